"""The tables of README.md, from results.json alone."""

from pathlib import Path

from plan import MODELS, ROUTERS

from mole_asr.score.markdown import ABSENT, markdown_pictures, markdown_table, percent, write_between_marks
from mole_asr.score.results import ResultFile, Row

PICTURES = {
    "quality.svg": "quality kept over the share of neurons that are computed",
    "speed.svg": "quality kept over how many times as fast the feed-forward parts are",
}
FIGURES = {"bits_per_byte": 3, "cer": 1}  # digits


def write_tables(results: ResultFile, readme: Path) -> str:
    """Makes all tables and writes them into the README between its marks, with the pictures; returns them."""
    parts = [_dense(results), _reach(results)]
    parts += [_sweep(results, name, slices) for name, model in MODELS.items() for slices in model.slices]
    text = "\n\n".join(part for part in (*parts, markdown_pictures(readme.parent, PICTURES)) if part)
    write_between_marks(readme, text)
    return text


def dense_row(results: ResultFile, model: str) -> Row | None:
    """What a model was before it was cut."""
    return next(iter(results.select(model=model, router="dense")), None)


def kept(results: ResultFile, row: Row) -> float | None:
    """Score of a cut model over that of the model that it, or what it was adapted from, was; None if not measured."""
    reference = dense_row(results, MODELS[row["model"]].of)
    return row["score"] / reference["score"] if reference and reference["score"] else None


def _figure(row: Row) -> str:
    return next((f"{row[name]:.{digits}f}" for name, digits in FIGURES.items() if name in row), ABSENT)


def _dense(results: ResultFile) -> str:
    header = ["dense model", "right", "bits a byte, or CER %", "quality kept", "neurons that are zero"]
    lines = []
    for name, model in MODELS.items():
        if row := dense_row(results, name):
            cells = [model.title, percent(row["score"]), _figure(row), percent(kept(results, row))]
            lines.append([*cells, percent(row["silent_share"])])
    return markdown_table(header, lines) if lines else ""


def _reach(results: ResultFile) -> str:
    """A line a model: 25 % of the neurons, the best split for each router."""
    header = ["25 % of the neurons", "slices", "router", "split", "quality kept", "feed-forward parts", "whole model"]
    lines = []
    for name, model in MODELS.items():
        for slices in model.slices:
            for router in ROUTERS:
                found = results.select(model=name, slices=slices, router=router, share=0.25)
                for rows in ([row for row in found if not row["tuned"]], [row for row in found if row["tuned"]]):
                    if rows:
                        best = max(rows, key=lambda row: row["score"])
                        chosen_by = f"{router}, tuned {best['tuned']} steps" if best["tuned"] else router
                        cells = [model.title, str(slices), chosen_by, best["split"], percent(kept(results, best))]
                        lines.append([*cells, f"{best['speed_up']:.2f} x", f"{best['model_speed_up']:.2f} x"])
    return markdown_table(header, lines) if lines else ""


def _sweep(results: ResultFile, model: str, slices: int) -> str:
    """Split x router over shares: quality kept (bits a byte, or CER), times as fast."""
    shares = sorted({row["share"] for row in results.select(model=model, slices=slices)})
    if not shares or not results.select(model=model, router=ROUTERS[0]):
        return ""
    header = [f"{MODELS[model].title}, {slices} slices", "router", *(f"{100 * share:g} %" for share in shares)]
    lines = []
    cuts = [split for split, number in MODELS[model].cuts if number == slices]
    for split in [split for split in cuts if results.select(model=model, slices=slices, split=split)]:
        for router in ROUTERS:
            cells = [split, router]
            for share in shares:
                found = results.select(model=model, slices=slices, split=split, router=router, share=share, tuned=0)
                cells.append(
                    f"{percent(kept(results, found[0]))} ({_figure(found[0])}), {found[0]['speed_up']:.2f} x"
                    if found
                    else ABSENT
                )
            lines.append(cells)
    return markdown_table(header, lines)
