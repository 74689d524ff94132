"""The pictures of README.md, from results.json alone."""

from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from plan import CONDITIONS, DENSE, EVERYWHERE, SYSTEMS
from tables import runs_of

from mole_asr.score.charts import save_figure
from mole_asr.score.results import ResultFile, Row

_FIGURES = {"language_entropy": "entropy within a language / log E", "purity": "purity of the experts"}
_COMPARED = {"wide-last2": "#999999", "post-moe": "#e6550d", "families": "#31a354", "all": "#7b3294"}


def draw(results: ResultFile, folder: Path) -> None:
    """Writes the pictures, as far as there are results for them."""
    conditions = [name for name in CONDITIONS if any(runs_of(results, name, system) for system in EVERYWHERE)]
    if conditions:
        save_figure(_spread(results, conditions), folder / "spread.svg")
    conditions = [name for name in CONDITIONS if runs_of(results, name, DENSE)]
    if conditions:
        save_figure(_languages(results, conditions), folder / "languages.svg")


def _spread(results: ResultFile, conditions: list[str]) -> Figure:
    """Entropy falls and purity rises where languages go different ways: "spread out in the end"."""
    figure = Figure(figsize=(9, 3.4 * len(conditions)), layout="constrained")
    axes = figure.subplots(len(conditions), len(_FIGURES), squeeze=False)
    for line, condition in zip(axes, conditions, strict=True):
        for cell, (key, title) in zip(line, _FIGURES.items(), strict=True):
            for system in EVERYWHERE:
                if rows := runs_of(results, condition, system):
                    layers = [layer["layer"] for layer in rows[0]["layers"]]
                    means = [mean(row["layers"][n][key] for row in rows) for n in range(len(layers))]
                    cell.plot(layers, means, marker="o", label=SYSTEMS[system].title)
            cell.set(xlabel="layer", ylabel=title, ylim=(0, 1), title=CONDITIONS[condition].title)
            cell.legend(frameon=False, fontsize=7)
    return figure


def _languages(results: ResultFile, conditions: list[str]) -> Figure:
    """What each language gains or loses against the dense model."""
    figure = Figure(figsize=(11, 3.2 * len(conditions)), layout="constrained")
    for place, condition in enumerate(conditions, 1):
        axes = figure.add_subplot(len(conditions), 1, place)
        dense = _bits(runs_of(results, condition, DENSE))
        for system, colour in _COMPARED.items():
            if rows := runs_of(results, condition, system):
                bits = _bits(rows)
                heights = [bits[code] - dense[code] for code in dense]
                axes.plot(list(dense), heights, "o", color=colour, markersize=4, label=SYSTEMS[system].title)
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set(ylabel="bits a byte − dense", title=CONDITIONS[condition].title)
        axes.tick_params(axis="x", labelsize=7)
        axes.legend(frameon=False, fontsize=7)
    return figure


def _bits(rows: list[Row]) -> dict[str, float]:
    return {code: mean(row["bits"][code] for row in rows) for code in rows[0]["bits"]}
