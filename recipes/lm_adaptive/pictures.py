"""The pictures of README.md, from results.json alone."""

from pathlib import Path

from matplotlib.figure import Figure
from plan import SYSTEMS
from tables import BITS, CPU, FLOPS

from mole_asr.score.charts import save_figure
from mole_asr.score.results import ResultFile

_SHOWN = {"dense": "#444444", "top-1": "#b8860b", "top-2": "#7b3294", "adaptive": "#e6550d"}
_SHOWN |= {"adaptive-shuffled": "#2b8cbe"}
_DRIFT = ("adaptive", "adaptive-shuffled", "adaptive-0.4")


def draw(results: ResultFile, folder: Path) -> None:
    """Writes the pictures, as far as there are results for them."""
    if any(results.select(system=name, kind="quality") for name in _SHOWN):
        save_figure(_curves(results), folder / "curves.svg")
    if any(row["shares"] for row in results.select(kind="quality")):
        save_figure(_shares(results), folder / "shares.svg")


def _curves(results: ResultFile) -> Figure:
    """Bits a byte over CPU seconds, and over FLOPs; the beginning, where all fall alike, is cut off."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, colour in _SHOWN.items():
        for number, row in enumerate(results.select(system=name, kind="quality")):
            curve = row["curve"][len(row["curve"]) // 4 :]
            title = SYSTEMS[name].title if number == 0 else None
            for place, (column, unit) in enumerate(((CPU, 1), (FLOPS, 1e12))):
                values = [[point[column] / unit for point in curve], [point[BITS] for point in curve]]
                axes[place].plot(*values, color=colour, marker=".", label=title)
    axes[0].set(xlabel="CPU seconds of training", ylabel="bits a byte, dev texts")
    axes[1].set(xlabel="TFLOP of training")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _shares(results: ResultFile) -> Figure:
    """Share of two-expert tokens in the batches of the training, a line a layer."""
    names = [name for name in _DRIFT if results.select(system=name, kind="quality")]
    figure = Figure(figsize=(3.6 * max(len(names), 1), 3.2), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        row = results.select(system=name, kind="quality")[0]
        steps, *layers = zip(*row["shares"], strict=True)
        for layer, shares in zip(row["layers"], layers, strict=True):
            axes.plot(steps, [100 * share for share in shares], label=f"layer {layer['layer']}")
        axes.set(xlabel="step", ylabel="% of tokens with two experts", ylim=(0, 100))
        axes.set_title(SYSTEMS[name].title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    return figure
