"""The tables of README.md, from results.json alone."""

from pathlib import Path

from plan import MODELS, WAYS

from mole_asr.score.markdown import ABSENT, markdown_pictures, markdown_table, percent, write_between_marks
from mole_asr.score.results import ResultFile, Row

PICTURES = {"quality.svg": "quality kept by each split and router"}


def write_tables(results: ResultFile, readme: Path) -> str:
    """Makes all tables and writes them into the README between its marks, with the picture; returns them."""
    parts = [_table(results, name) for name in MODELS]
    text = "\n\n".join(part for part in (*parts, markdown_pictures(readme.parent, PICTURES)) if part)
    write_between_marks(readme, text)
    return text


def dense_row(results: ResultFile, model: str) -> Row | None:
    """What a model was before it was cut."""
    return next(iter(results.select(model=model, router="dense")), None)


def kept(results: ResultFile, row: Row, column: str = "score") -> float | None:
    """Score of a cut model over that of the dense one."""
    reference = dense_row(results, row["model"])
    return row[column] / reference["score"] if reference and reference["score"] else None


def _figure(row: Row) -> str:
    return f"{row['cer']:.1f}" if "cer" in row else f"{row['bits_per_byte']:.3f}"


def _table(results: ResultFile, model: str) -> str:
    dense = dense_row(results, model)
    if dense is None:
        return ""
    measure = "CER %" if "cer" in dense else "bits a byte"
    header = [f"{MODELS[model].title}", "split", "router", "neurons", measure, "quality kept", "untrained"]
    header += ["feed-forward parts", "whole model"]
    lines = [["dense", ABSENT, ABSENT, "100 %", _figure(dense), "100.0 %", ABSENT, "1.00 x", "1.00 x"]]
    for way in WAYS:
        columns = {"split": way.split, "slices": way.slices, "router": way.learning, "active": way.active}
        for row in results.select(model=model, **columns):
            cells = [way.title, way.split, way.learning.replace("_", " "), f"{100 * row['share']:g} %", _figure(row)]
            cells += [percent(kept(results, row)), percent(kept(results, row, "score_untrained"))]
            lines.append([*cells, f"{row['speed_up']:.2f} x", f"{row['model_speed_up']:.2f} x"])
    return markdown_table(header, lines)
