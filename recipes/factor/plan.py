"""What is factorised, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mole_asr.convert.factor import Learning
from mole_asr.moe.convert.splits import Split

HERE = Path(__file__).parent
BASE = HERE.parent / "moefy" / "config.yaml"
CONFIG = HERE / "config.yaml"  # laid over it


@dataclass(frozen=True)
class Model:
    """A model that is factorised.

    Attributes:
        name: on the command line and in results.json.
        title: in the tables.
        kind: "text" trains one, "speech" takes a trained one.
        steps: of the short training.
        rows: tokens or frames that it is trained on.
        test_rows: that it is tested on.
    """

    name: str
    title: str
    kind: Literal["text", "speech"]
    steps: int
    rows: int
    test_rows: int


@dataclass(frozen=True)
class Way:
    """How a model is factorised: "1R4E1K" is one router, four slices, of which one computes a token."""

    split: Split
    learning: Learning
    active: int
    slices: int = 4

    @property
    def title(self) -> str:
        """As the paper writes it."""
        return f"1R{self.slices}E{self.active}K"


MODELS = {
    model.name: model
    for model in (
        Model("swiglu", "text, SwiGLU", "text", steps=300, rows=100_000, test_rows=12_000),
        Model("speech", "recogniser, SiLU", "speech", steps=200, rows=60_000, test_rows=8_000),
    )
}
LR = 3e-3  # of the slices, at most; a third of it keeps less after as many steps
ROUNDS = 3  # of each timing
CUT_ROWS = 20_000  # of the training data, by which splits are found
LEARNINGS: tuple[Learning, ...] = ("oracle", "prior", "end_to_end", "untrained")
SPLITS: tuple[Split, ...] = ("contiguous", "random", "clusters", "coactivation")
WAYS = tuple(
    Way(split, learning, active)
    for active in (1, 2)
    for split in SPLITS
    for learning in LEARNINGS
    # All routers in one split, all splits with the paper's router.
    if split == "random" or learning == "prior"
)
