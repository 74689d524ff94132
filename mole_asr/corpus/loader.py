"""What all loaders of batches share: they keep no place of their own, the trainer knows where a resumed run goes on."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

log = logging.getLogger(__name__)


class PlacedLoader:
    """Batches of one rank, from where the trainer stands.

    `__iter__` is to be a generator, so that it asks for the place at the first fetch, when Lightning has restored or
    advanced its counters. Those counters are saved in every checkpoint, which is all a resume needs. It is no
    DataLoader, so Lightning injects no sampler into it.

    Args:
        num_batches: of every epoch.
        place: returns (epoch, next batch).
        unit: what batches consist of, for a warning.
    """

    def __init__(self, num_batches: int, place: Callable[[], tuple[int, int]], unit: str) -> None:
        self.num_batches, self.place, self.unit = num_batches, place, unit

    def __len__(self) -> int:
        return self.num_batches

    def state_dict(self) -> dict[str, Any]:
        """Nothing to restore, only something to check."""
        return {"num_batches": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warns if the data or the batch size changed since the checkpoint was written."""
        if state["num_batches"] != len(self):
            log.warning(
                "an epoch had %d batches when the checkpoint was written and has %d now: "
                "the rest of the current epoch repeats or misses some %s",
                state["num_batches"],
                len(self),
                self.unit,
            )


def place_of(trainer: "Trainer | None") -> tuple[int, int]:
    """Epoch and next batch from Lightning's own counters, which its checkpoints carry."""
    if trainer is None:
        return 0, 0
    return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
