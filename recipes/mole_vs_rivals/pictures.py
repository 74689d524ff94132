"""The pictures of README.md, from results.json and details.json alone."""

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from measure import BINS
from plan import CONDITIONS, SYSTEMS
from results import Results, detail_key
from tables import runs_of

from mole_asr.score.charts import save_figure

SHOWN = ("dense", "dense-lid", "monolingual", "switch", "lr-moe", "mole", "mole-family", "mole-true")
_COLOURS = ("#444444", "#999999", "#b8860b", "#7b3294", "#2b8cbe", "#e6550d", "#31a354", "#fdae6b")
_RIGHT_WRONG = ["#2b8cbe", "#e6550d"]


def draw(results: Results, folder: Path) -> None:
    """Writes the pictures of README.md, as far as there are results for them."""
    measured = [name for name in CONDITIONS if results.select(condition=name, test_set="test")]
    if not measured:
        return
    save_figure(_wer_by_hours(results, measured), folder / "wer_by_hours.svg")
    for name, make in (("reliability", _reliability), ("experts", _experts), ("gradients", _gradients)):
        if (figure := make(results, measured)) is not None:
            save_figure(figure, folder / f"{name}.svg")


def _wer_by_hours(results: Results, conditions: list[str]) -> Figure:
    """WER of each language over its hours of training, a line a system."""
    figure = Figure(figsize=(5.2 * len(conditions), 4.2), layout="constrained")
    for place, condition in enumerate(conditions, 1):
        axes = figure.add_subplot(1, len(conditions), place)
        for system, colour in zip(SHOWN, _COLOURS, strict=True):
            runs = list(runs_of(results, system, condition, "test").values())
            if not runs:
                continue
            codes = sorted((code for code in runs[0] if code != "all"), key=lambda c: (runs[0][c]["train_hours"], c))
            hours = [runs[0][code]["train_hours"] for code in codes]
            rates = [mean(rows[code]["wer"] for rows in runs) for code in codes]
            axes.plot(hours, rates, color=colour, marker="o", markersize=3, label=SYSTEMS[system].title)
            if system == "dense":
                for code, x, y in zip(codes, hours, rates, strict=True):
                    axes.annotate(code, (x, y), textcoords="offset points", xytext=(3, 5), fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(ScalarFormatter())
        axes.tick_params(axis="x", which="both", labelsize=7)
        axes.set_xlabel("hours of training speech")
        axes.set_ylabel("WER %")
        axes.set_title(condition, fontsize=10)
        axes.legend(frameon=False, fontsize=7)
    return figure


def _reliability(results: Results, conditions: list[str]) -> Figure | None:
    """Histograms of r of MoLE where the language was right and wrong, known voices beside new ones."""
    cells = [
        (condition, test, runs)
        for condition in conditions
        for test in ("test", "unseen")
        if (runs := _details(results, "mole", condition, test))
    ]
    if not cells:
        return None
    figure = Figure(figsize=(4.2 * len(cells), 3), layout="constrained")
    for place, (condition, test, runs) in enumerate(cells, 1):
        axes = figure.add_subplot(1, len(cells), place)
        counts = [np.sum([run[f"reliability_{which}"] for run in runs], axis=0) for which in ("right", "wrong")]
        centres = (BINS[:-1] + BINS[1:]) / 2
        for values, colour, which in zip(counts, _RIGHT_WRONG, ("right", "wrong"), strict=True):
            shares = 100 * values / max(values.sum(), 1)
            axes.bar(
                centres, shares, width=BINS[1], color=colour, alpha=0.7, label=f"{which}: {values.sum()} utterances"
            )
        axes.set_xlabel("r")
        axes.set_ylabel("% of these utterances, all seeds")
        axes.set_title(f"MoLE, {condition}, {test}", fontsize=10)
        axes.legend(frameon=False, fontsize=8, title="language", loc="upper left")
    return figure


def _experts(results: Results, conditions: list[str]) -> Figure | None:
    """What share of a language's frames each expert of the lowest layer computes."""
    names = ("mole", "mole-frame", "mole-family", "lr-moe", "dlg-moe", "switch", "omni")
    cells = [
        (condition, system, runs[0]["serves"])
        for condition in conditions
        for system in names
        if (runs := _details(results, system, condition, "test")) and any(runs[0]["serves"].values())
    ]
    if not cells:
        return None
    columns = min(len(cells), len(names))
    figure = Figure(figsize=(3 * columns, 3 * -(-len(cells) // columns)), layout="constrained")
    for place, (condition, system, serves) in enumerate(cells, 1):
        axes = figure.add_subplot(-(-len(cells) // columns), columns, place)
        axes.imshow(
            [100 * np.array(layers[0]) for layers in serves.values()], vmin=0, vmax=100, cmap="Blues", aspect="auto"
        )
        axes.set_yticks(range(len(serves)), list(serves))
        axes.set_xlabel("expert")
        axes.set_title(f"{system}, {condition}", fontsize=9)
    return figure


def _gradients(results: Results, conditions: list[str]) -> Figure | None:
    """Norms of the gradients of MoLE's experts in each tenth of the training, the mean of all seeds."""
    cells = [
        (condition, norms)
        for condition in conditions
        if (norms := [run["gradients"] for run in _details(results, "mole", condition, "test") if run["gradients"]])
    ]
    if not cells:
        return None
    figure = Figure(figsize=(4.2 * len(cells), 3.2), layout="constrained")
    for place, (condition, runs) in enumerate(cells, 1):
        axes = figure.add_subplot(1, len(cells), place)
        for name in runs[0]:
            tenths = np.mean([run[name] for run in runs], axis=0)
            colour, width = ("black", 2.5) if name == "agnostic" else (None, 1)
            axes.plot(np.arange(1, len(tenths) + 1), tenths, color=colour, linewidth=width, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("tenth of the training")
        axes.set_ylabel("norm of the gradient")
        axes.set_title(f"MoLE, {condition}", fontsize=10)
        axes.legend(frameon=False, fontsize=7, ncols=2)
    return figure


def _details(results: Results, system: str, condition: str, test: str) -> list[dict[str, Any]]:
    return [
        results.details[detail_key(system, condition, seed, test)] for seed in runs_of(results, system, condition, test)
    ]
