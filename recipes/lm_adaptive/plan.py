"""What is compared: each system is a file of `systems/` over `base.yaml`, and words for `mole-asr fit`."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
BASE = HERE / "base.yaml"


@dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
        name: on the command line and in results.json.
        title: in the tables.
        config: file in `systems/` that is laid over the base; None: `<name>.yaml`.
        words: more for `mole-asr fit`.
    """

    name: str
    title: str
    config: str | None = None
    words: tuple[str, ...] = ()

    @property
    def config_path(self) -> Path:
        """The file that is laid over the base."""
        return HERE / "systems" / f"{self.config or self.name}.yaml"


def _threshold(value: str) -> System:
    words = (f"--model.experts.threshold={value}",)
    return System(f"adaptive-{value}", f"adaptive, T = {value}", "adaptive", words)


SYSTEMS = {
    system.name: system
    for system in (
        System("dense", "dense"),
        System("top-1", "top-1"),
        System("top-2", "top-2"),
        System("adaptive", "adaptive, T = 0.1"),
        System("adaptive-shuffled", "adaptive, T = 0.1, without curriculum", "adaptive", ("--data.curriculum=false",)),
        *map(_threshold, ("0.05", "0.2", "0.4")),
    )
}
REFERENCE = "top-2"
