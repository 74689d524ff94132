"""What the Lightning tasks of recognisers and of language models share: a known end, clipping, and a safe resume."""

import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mole_asr.errors import MoleError


class ResumableTask(LightningModule):
    """A task whose `model` has `languages`.

    Attributes:
        ids_name: what gives token ids their meaning, for messages.
        ids_key: of its checksum in a checkpoint.
        seed: of the whole training.
        loss_weights: an attribute a loss.
    """

    ids_name: ClassVar[str]
    ids_key: ClassVar[str]
    model: Any
    seed: int
    loss_weights: Any

    def ids_fingerprint(self) -> bytes:
        """What differs where token ids mean something else."""
        raise NotImplementedError

    def switches(self) -> dict[str, Any]:
        """What a model of the same shapes may do otherwise: key -> value."""
        raise NotImplementedError

    def planned_steps(self) -> int:
        """Steps of the whole training.

        Raises:
            MoleError: it has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise MoleError("trainer.max_epochs: the learning rate needs to know the end; give a number of epochs")
        return int(steps)

    def seed_step(self, batch_index: int) -> None:
        """Seeds torch by the place of a step, so that a resumed run draws what it would have drawn."""
        place = f"{self.seed} {self.current_epoch} {batch_index} {self.global_rank}"
        torch.manual_seed(zlib.crc32(place.encode()))

    def weighted_sum(self, named: Mapping[str, Tensor], batch_size: int) -> Tensor:
        """The losses of a batch, each times its weight, added up; logs them and the sum."""
        total = sum((getattr(self.loss_weights, name) * loss for name, loss in named.items()), torch.zeros(()))
        self.log_dict({f"train/{name}": loss.detach() for name, loss in named.items()}, batch_size=batch_size)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=batch_size)
        return total

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm, or by value; Lightning refuses to with a fused optimizer, as float16's are scaled."""
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes what the ids mean, to refuse a resume that would change it."""
        checkpoint["languages"] = self.model.languages
        checkpoint[self.ids_key] = zlib.crc32(self.ids_fingerprint())
        checkpoint["switches"] = self.switches()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the run to resume has the same languages, meaning of ids, sizes and switches.

        Raises:
            MoleError: it has not.
        """
        same = checkpoint.get("languages") == self.model.languages
        if not same or checkpoint.get(self.ids_key) != zlib.crc32(self.ids_fingerprint()):
            raise MoleError(
                f"the run to resume has another {self.ids_name} or other languages than the data now: "
                "give another --output, or remove its checkpoints folder to train anew"
            )
        old, new = ({k: v.shape for k, v in s.items()} for s in (checkpoint["state_dict"], self.state_dict()))
        if old != new:
            raise MoleError(
                "the run to resume has other model sizes: give another --output, or remove its checkpoints folder"
            )
        was, now = checkpoint.get("switches", {}), self.switches()
        if changed := [key for key in was if was[key] != now.get(key)]:
            raise MoleError(
                f"{changed[0]}: the run to resume has {was[changed[0]]}, not {now.get(changed[0])}: give another "
                "--output, or remove its checkpoints folder"
            )
