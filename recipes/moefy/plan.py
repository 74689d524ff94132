"""What is cut, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mole_asr.moe.convert.sliced import RouterKind
from mole_asr.moe.convert.splits import Split

HERE = Path(__file__).parent
CONFIG = HERE / "config.yaml"
SPLITS: tuple[Split, ...] = ("random", "clusters", "coactivation")
TUNED: tuple[Split, ...] = ("coactivation",)
"""Splits whose cuts at a quarter of the neurons, with the learned router, are trained afterwards too."""
ROUTERS: tuple[RouterKind, ...] = ("oracle", "mlp", "centroid")


@dataclass(frozen=True)
class Model:
    """A model that is cut.

    Attributes:
        name: on the command line and in results.json.
        title: in the tables.
        kind: "text" trains one by `config.yaml`, "speech" takes a trained one.
        of: name of the model that it is compared with: itself, or that which it was adapted from.
        words: for `mole-asr fit`.
        slices: E, the first for all splits, others for those of `TUNED` alone.
    """

    name: str
    title: str
    kind: Literal["text", "speech"]
    of: str
    words: tuple[str, ...] = ()
    slices: tuple[int, ...] = (8,)

    @property
    def cuts(self) -> list[tuple[Split, int]]:
        """Splits and numbers of slices."""
        return [(split, n) for n in self.slices for split in (SPLITS if n == self.slices[0] else TUNED)]

    @property
    def adapted(self) -> bool:
        """Whether it is adapted to ReLU."""
        return self.of != self.name


MODELS = {
    model.name: model
    for model in (
        Model("relu", "text, ReLU", "text", "relu", slices=(8, 4)),
        Model(
            "swiglu",
            "text, SwiGLU",
            "text",
            "swiglu",
            ("--model.network.activation=swiglu", "--model.network.d_ff=512"),
            (8, 4),
        ),
        Model("swiglu-adapted", "the same, adapted to ReLU", "text", "swiglu", slices=(8, 4)),
        Model("speech", "recogniser, SiLU", "speech", "speech", slices=(8, 4)),
        Model("speech-adapted", "the same, adapted to ReLU", "speech", "speech", slices=(8, 4)),
    )
}
SHARES = (0.125, 0.25, 0.5)
CALIBRATION_ROWS = 20_000
TEST_ROWS = {"text": 12_000, "speech": 8_000}
ROUNDS = 7  # of each timing
TUNED_SHARE = 0.25
TUNING = {"text": 600, "speech": 150}
"""Steps of that training, on the data of the adaptation."""
ADAPTATION = {"text": (200, 300_000), "speech": (150, 60_000)}
"""Steps of the ReLU adaptation, and rows of its data."""
