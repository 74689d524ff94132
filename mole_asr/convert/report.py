"""What the verbs print of a conversion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mole_asr.convert.host import Quality
from mole_asr.convert.speed import Speed
from mole_asr.moe.convert.sliced import SlicedLayer


@dataclass(frozen=True)
class Conversion:
    """What became of a model; as text, what a verb prints.

    Attributes:
        lines: on its parts, their speed and their quality, and where it is.
        failures: "id: reason" of each utterance that could not be read and was skipped.
    """

    lines: Sequence[str]
    failures: Sequence[str]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def lines_of(
    layers: Mapping[str, SlicedLayer],
    errors: Mapping[str, float],
    speed: Speed | None,
    before: Quality | None,
    after: Quality | None,
) -> list[str]:
    """A line a part, one on the speed, one on the quality; what was not measured is left out.

    Args:
        layers: by the names of their parts.
        errors: of each part that has been compared with the dense one.
        speed: of all parts.
        before: quality of the dense model.
        after: quality of the sliced one.
    """
    width = max(map(len, layers))
    lines = []
    for name, layer in layers.items():
        config = layer.config
        neurons = config.d_ff // config.slices
        line = f"{name:<{width}}  {config.active} of {config.slices} slices of {neurons} neurons, {config.activation}"
        lines.append(line + (f", output error {errors[name]:.3f}" if name in errors else ""))
    if speed is not None:
        lines.append(
            f"feed-forward parts, {speed.rows} rows, {speed.place}: dense {speed.dense:.2f} ms, dense in tiles "
            f"{speed.dense_tiled:.2f} ms, sliced {speed.sliced:.2f} ms: {speed.speed_up:.2f} times as fast"
        )
    if before is not None and after is not None:
        figures = [f"{name} {value:.4g} -> {after.figures[name]:.4g}" for name, value in before.figures.items()]
        kept = f"{100 * after.score / before.score:.1f} % kept" if before.score > 0 else "nothing to keep"
        lines.append("; ".join([*figures, f"right {before.score:.4f} -> {after.score:.4f} ({kept})"]))
    return lines
