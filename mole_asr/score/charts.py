"""Pictures of the report as SVG text, drawn without a display and without a pyplot state."""

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from mole_asr.asr.routing import Routing
from mole_asr.errors import MoleError
from mole_asr.files import write_text

_INK = "#012345"  # stands for the page's text colour, so that the pictures follow a dark page
_RIGHT_WRONG = ["#2b8cbe", "#e6550d"]
_FOLDS = {"train": "#8c8c8c", "valid": "#2b8cbe"}
_FIRST_CURVES = ("loss", "cer", "wer")
_BINS = 20

Curves = dict[str, list[tuple[int, float]]]


def read_curves(logs: str | Path, prefixes: tuple[str, ...] = ("train/", "valid/")) -> Curves:
    """Reads Lightning's CSV logs: (step, value) of every column whose name begins with one of `prefixes`.

    A resumed run begins another `metrics.csv` in a folder of its own; where a later file begins, earlier ones end.

    Args:
        logs: a `metrics.csv`, or a folder that holds some at any depth.
        prefixes: of the columns.

    Raises:
        MoleError: there is no such file, or it has no column `step`.
    """
    logs = Path(logs)
    files = [logs] if logs.is_file() else sorted(logs.rglob("metrics.csv"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise MoleError(f"{logs} holds no metrics.csv: give the folder of the training logs")
    curves: Curves = {}
    for file in files:
        found = _read_metrics(file, prefixes)
        start = min((points[0][0] for points in found.values()), default=math.inf)
        curves = {name: [point for point in points if point[0] < start] for name, points in curves.items()}
        for name, points in found.items():
            curves.setdefault(name, []).extend(points)
    return {name: points for name, points in curves.items() if points}


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """One panel a quantity, training and validation together; loss and error rates come first."""
    names = {name.split("/", 1)[1] for name in curves}
    ordered = sorted(names, key=lambda name: (*(not name.startswith(first) for first in _FIRST_CURVES), name))
    columns = min(len(ordered), 3)
    rows = math.ceil(len(ordered) / columns)

    def paint(figure: Figure) -> None:
        for place, name in enumerate(ordered, 1):
            axes = figure.add_subplot(rows, columns, place)
            for fold, colour in _FOLDS.items():
                if points := curves.get(f"{fold}/{name}"):
                    steps, values = zip(*points, strict=True)
                    axes.plot(steps, values, color=colour, label=fold, marker="." if len(points) < 50 else None)
            axes.set_title(name)
            axes.set_xlabel("step")
            axes.legend(frameon=False)

    return _draw("curves", 2.6 * rows, paint)


def draw_reliability(reliability: np.ndarray, right: np.ndarray) -> str:
    """Histogram of the reliability, utterances whose language was right beside those where it was wrong."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        groups = [reliability[right], reliability[~right]]
        axes.hist(groups, bins=list(np.linspace(0, 1, _BINS + 1)), color=_RIGHT_WRONG, label=["right", "wrong"])
        axes.set_xlabel("reliability")
        axes.set_ylabel("utterances")
        axes.legend(frameon=False, title="language")

    return _draw("reliability", 2.6, paint)


def draw_routing(routing: Routing) -> str:
    """Heat map of the language posteriors over time."""
    count = len(routing.languages)
    end_s = len(routing.evidence_TN) * routing.frame_shift_s

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        picture = axes.imshow(
            routing.evidence_TN.T,
            aspect="auto",
            interpolation="nearest",
            extent=(0.0, end_s, count - 0.5, -0.5),
            vmin=0,
            vmax=1,
        )
        axes.set_yticks(range(count), routing.languages)
        axes.set_xlabel("seconds")
        figure.colorbar(picture, ax=axes, pad=0.01)

    return _draw("routing", 1.2 + 0.3 * count, paint)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes an SVG that is the same, byte for byte, from the same results."""
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    write_text(path, stream.getvalue())


def _read_metrics(file: Path, prefixes: tuple[str, ...]) -> Curves:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            table = list(csv.DictReader(stream))
    except OSError as error:
        raise MoleError(f"cannot read {file}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise MoleError(f"{file} is no table: give a metrics.csv of a training run") from None
    if table and "step" not in table[0]:
        raise MoleError(f"{file} has no column 'step': give a metrics.csv of a training run")
    curves: Curves = {}
    for row in table:
        step = _float(row["step"])
        for name, text in row.items():
            # Rows are sparse: a row holds what was logged at that moment. A run killed in mid-row leaves a short one.
            if name and name.startswith(prefixes) and math.isfinite(value := _float(text)) and math.isfinite(step):
                curves.setdefault(name, []).append((int(step), value))
    return curves


def _float(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return math.nan


def _draw(name: str, height_in: float, paint: Callable[[Figure], None]) -> str:
    """Draws a figure of the page's width and returns its `<svg>` element; `name` keeps its ids its own."""
    ink: dict[Any, str] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    )
    stream = io.StringIO()
    with rc_context(
        {**ink, "svg.fonttype": "none", "svg.hashsalt": name, "axes.facecolor": "none", "text.parse_math": False}
    ):
        figure = Figure(figsize=(10, height_in), layout="constrained", facecolor="none")
        paint(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
