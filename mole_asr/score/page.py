"""The page of a score: one HTML file that needs nothing else."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from unicodedata import bidirectional

import jinja2
import jiwer
import numpy as np

from mole_asr.asr.routing import Routing
from mole_asr.score.charts import Curves, draw_curves, draw_reliability, draw_routing
from mole_asr.score.groups import CHARACTER_ERRORS, CHARACTERS
from mole_asr.score.language_id import split_reliability
from mole_asr.score.pairs import Pair
from mole_asr.score.score import ScoreReport
from mole_asr.score.tables import comparison_lines, notes, table

WORST = 10


@dataclass(frozen=True, slots=True)
class AlignedWord:
    """A reference word above a hypothesis word; one of them is empty in a deletion or an insertion.

    `kind` is one of jiwer's names: equal, substitute, insert, delete.
    """

    kind: str
    reference: str
    hypothesis: str


@dataclass(frozen=True, slots=True)
class WorstUtterance:
    """An utterance to look at; `cer` is in percent, None without a reference; `direction` is `ltr` or `rtl`."""

    pair: Pair
    cer: float | None
    words: list[AlignedWord]
    direction: str


def page(report: ScoreReport, curves: Curves | None = None, routing: Routing | None = None) -> str:
    """Renders the page: tables, pictures and the worst utterances. What is not known is left out."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("mole_asr.score").joinpath("report.html").read_text(encoding="utf-8"))
    reliability, right = split_reliability(report.pairs)
    header, *rows = table(report)
    return template.render(
        report=report,
        header=header,
        rows=rows,
        notes=notes(report),
        comparison=comparison_lines(report.comparison, len(report.languages)) if report.comparison else [],
        curves=draw_curves(curves) if curves else None,
        reliability=draw_reliability(reliability, right) if len(reliability) else None,
        routing=routing,
        routing_picture=draw_routing(routing) if routing else None,
        worst=worst_utterances(report),
        direction=direction,
    )


def worst_utterances(report: ScoreReport, count: int = WORST) -> list[WorstUtterance]:
    """The utterances with errors that have the highest character error rate, the most errors first among equals.

    Words heard where nothing was said come first: their rate has no bound.
    """
    errors_N, lengths_N = report.counts_N4[:, CHARACTER_ERRORS], report.counts_N4[:, CHARACTERS]
    rates_N = np.where(lengths_N > 0, 100 * errors_N / np.maximum(lengths_N, 1), np.inf)
    rows = [row for row in np.lexsort((-errors_N, -rates_N)) if errors_N[row]][:count]
    return [
        WorstUtterance(
            pair=report.pairs[row],
            cer=float(rates_N[row]) if lengths_N[row] else None,
            words=align(report.pairs[row]),
            direction=direction(report.pairs[row].reference + report.pairs[row].hypothesis),
        )
        for row in rows
    ]


def align(pair: Pair) -> list[AlignedWord]:
    """The words of both texts side by side, by jiwer's alignment."""
    output: Any = jiwer.process_words(pair.reference, pair.hypothesis)
    said, heard = output.references[0], output.hypotheses[0]
    words = []
    for chunk in output.alignments[0]:
        above = said[chunk.ref_start_idx : chunk.ref_end_idx]
        below = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for place in range(max(len(above), len(below))):
            # A chunk of substitutions is as long on both sides; insertions and deletions have one side only.
            words.append(AlignedWord(chunk.type, "".join(above[place : place + 1]), "".join(below[place : place + 1])))
    return words


def direction(text: str) -> str:
    """`rtl` where the first letter with a direction is written from right to left, else `ltr`."""
    strong = (kind for kind in map(bidirectional, text) if kind in ("L", "R", "AL"))
    return "ltr" if next(strong, "L") == "L" else "rtl"
