"""What is compared: each system is a file of `systems/` over `base.yaml`, and words for `mole-asr fit`."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
BASE = HERE / "base.yaml"
CONTINUED = HERE / "continued.yaml"
REFERENCE = "top-2"
THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)  # of the gate that the trained reference is given


@dataclass(frozen=True)
class System:
    """One row of the tables.

    Attributes:
        name: on the command line and in results.json.
        title: in the tables.
        config: file in `systems/` that is laid over the base; None: `<name>.yaml`.
        words: more for `mole-asr fit`.
        goes_on: whether it starts from the trained model of `REFERENCE`, with `continued.yaml`.
    """

    name: str
    title: str
    config: str | None = None
    words: tuple[str, ...] = ()
    goes_on: bool = False

    @property
    def config_paths(self) -> list[Path]:
        """The base and what is laid over it, in this order."""
        system = HERE / "systems" / f"{self.config or self.name}.yaml"
        return [BASE, system, *([CONTINUED] if self.goes_on else [])]

    @property
    def is_adaptive(self) -> bool:
        """Whether its tokens take one expert or two."""
        return "adaptive" in (self.config, self.name)


def _threshold(value: str) -> System:
    words = (f"--model.experts.threshold={value}",)
    return System(f"adaptive-{value}", f"adaptive, T = {value}", "adaptive", words)


def _goes_on(system: System) -> System:
    config = system.config or system.name
    return System(f"continued-{system.name}", system.title, config, system.words, goes_on=True)


_FROM_NOTHING = (
    System("dense", "dense"),
    System("top-1", "top-1"),
    System("top-2", "top-2"),
    System("adaptive", "adaptive, T = 0.1"),
    System("adaptive-shuffled", "adaptive, T = 0.1, without curriculum", "adaptive", ("--data.curriculum=false",)),
    *map(_threshold, ("0.05", "0.2", "0.4")),
)
_CONTINUED = ("top-1", "top-2", "adaptive", "adaptive-0.4")
SYSTEMS = {system.name: system for system in _FROM_NOTHING}
SYSTEMS |= {system.name: system for system in (_goes_on(SYSTEMS[name]) for name in _CONTINUED)}
