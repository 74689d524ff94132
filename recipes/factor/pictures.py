"""The picture of README.md, from results.json alone."""

from pathlib import Path

from matplotlib.figure import Figure
from plan import MODELS, WAYS
from tables import dense_row, kept

from mole_asr.score.charts import save_figure
from mole_asr.score.results import ResultFile

_COLOURS = {1: "#2b8cbe", 2: "#e6550d"}


def draw(results: ResultFile, folder: Path) -> None:
    """Writes the picture, as far as there are results for it."""
    names = [name for name in MODELS if dense_row(results, name)]
    if not names:
        return
    figure = Figure(figsize=(5.0 * len(names), 3.6), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        labels = list(dict.fromkeys(f"{way.split}\n{way.learning.replace('_', ' ')}" for way in WAYS))
        for active, colour in _COLOURS.items():
            points = [
                (labels.index(f"{way.split}\n{way.learning.replace('_', ' ')}"), 100 * (kept(results, row) or 0))
                for way in WAYS
                if way.active == active
                for row in results.select(model=name, split=way.split, router=way.learning, active=active)
            ]
            if points:
                shifted = [(x + 0.2 * (active - 1.5) * 2, y) for x, y in points]
                axes.bar(*zip(*shifted, strict=True), width=0.38, color=colour, label=f"{active} of 4 slices")
        axes.set_xticks(range(len(labels)), labels, fontsize=6)
        axes.set_ylabel("quality kept, %", fontsize=8)
        axes.set_title(MODELS[name].title, fontsize=9)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    save_figure(figure, folder / "quality.svg")
