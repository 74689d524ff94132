"""The pictures of README.md, from results.json alone."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plan import MODELS, ROUTERS, SPLITS
from tables import dense_row, kept

from mole_asr.score.charts import save_figure
from mole_asr.score.results import ResultFile, Row

_COLOURS = {"random": "#8c8c8c", "clusters": "#2b8cbe", "coactivation": "#e6550d"}
_LINES = {"oracle": "--", "mlp": "-", "centroid": ":"}


def draw(results: ResultFile, folder: Path) -> None:
    """Writes the pictures, as far as there are results for them."""
    names = [name for name, model in MODELS.items() if dense_row(results, model.of) and results.select(model=name)]
    if names:
        save_figure(_figure(results, names, _over_share), folder / "quality.svg")
        save_figure(_figure(results, names, _over_speed), folder / "speed.svg")


def _figure(results: ResultFile, names: list[str], paint: Callable[[Axes, ResultFile, list[Row], str], None]) -> Figure:
    """A panel a model."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.0 * lines), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(lines, columns, place)
        slices = MODELS[name].slices[0]
        for split in SPLITS:
            for router in ROUTERS:
                rows = results.select(model=name, split=split, router=router, slices=slices, tuned=0)
                if rows:
                    paint(axes, results, sorted(rows, key=lambda row: row["share"]), f"{split}, {router}")
        axes.axhline(95, color="#444444", linewidth=0.6)
        axes.set_title(f"{MODELS[name].title}, {slices} slices", fontsize=9)
        axes.set_ylabel("quality kept, %", fontsize=8)
        axes.set_ylim(0, max(102, axes.get_ylim()[1]))
    # One model may have lines that another lacks.
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    return figure


def _over_share(axes: Axes, results: ResultFile, rows: list[Row], label: str) -> None:
    split, router = rows[0]["split"], rows[0]["router"]
    points = [(100 * row["share"], 100 * (kept(results, row) or 0)) for row in rows]
    axes.plot(*zip(*points, strict=True), _LINES[router], color=_COLOURS[split], marker=".", label=label)
    axes.set_xlabel("% of the neurons", fontsize=8)


def _over_speed(axes: Axes, results: ResultFile, rows: list[Row], label: str) -> None:
    split, router = rows[0]["split"], rows[0]["router"]
    points = [(row["speed_up"], 100 * (kept(results, row) or 0)) for row in rows]
    axes.plot(*zip(*points, strict=True), _LINES[router], color=_COLOURS[split], marker=".", label=label)
    axes.axvline(1.6, color="#444444", linewidth=0.6)
    axes.set_xlabel("times as fast as dense, feed-forward parts", fontsize=8)
