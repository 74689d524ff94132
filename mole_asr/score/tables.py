"""The table of a score: cells for the page, aligned text for the terminal."""

from unicodedata import east_asian_width

from mole_asr.score.bootstrap import Difference
from mole_asr.score.groups import GroupScore, Interval
from mole_asr.score.markdown import ABSENT, number
from mole_asr.score.score import Comparison, ScoreReport

NAMED_AT_MOST = 5


def table(report: ScoreReport) -> list[list[str]]:
    """Cells of the table, the header first: a row a language or speaker, then the mean over languages and the total.

    Columns for which no row has a figure are left out.
    """
    groups = {"language": report.languages, "speaker": report.speakers}.get(report.by or "", {})
    named = list(groups.items())
    if len(report.languages) > 1:
        named.append(("macro", report.macro))
    named.append(("all", report.pooled))
    rows = [_row(name, group) for name, group in named]
    header = [report.by or "", *_row("", GroupScore())]
    filled = [key for key in rows[0] if any(row[key] != ABSENT for row in rows)]
    return [[header[0], *filled[1:]], *([row[key] for key in filled] for row in rows)]


def comparison_lines(comparison: Comparison, languages: int) -> list[str]:
    """One line a metric and average: the difference, its interval and its p value."""
    kinds = {"all": comparison.pooled} | ({"macro": comparison.macro} if languages > 1 else {})
    return [
        f"{metric.upper()} ({kind}): {_difference(found)}"
        for kind, metrics in kinds.items()
        for metric, found in metrics.items()
    ]


def notes(report: ScoreReport) -> list[str]:
    """Whole sentences below the table: what is missing, calibration, speed."""
    lines = [_missing(report, report.hypothesis, report.missing)] if report.missing else []
    if report.comparison and report.comparison.missing:
        lines.append(_missing(report, report.comparison.against, report.comparison.missing))
    if report.pooled.ece is not None:
        lines.append(f"expected calibration error of the reliability: {report.pooled.ece:.3f}")
    if report.real_time_factor is not None:
        lines.append(f"real-time factor: {report.real_time_factor:.3f} ({report.seconds:.1f} s)")
    return lines


def text_table(report: ScoreReport) -> str:
    """The table as aligned text, with the comparison and the notes below."""
    cells = table(report)
    widths = [max(_width(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padding = [" " * (width - _width(cell)) for width, cell in zip(widths, row, strict=True)]
        first, *others = [
            cell + pad if column == 0 else pad + cell
            for column, (cell, pad) in enumerate(zip(row, padding, strict=True))
        ]
        lines.append("  ".join([first, *others]).rstrip())
    if report.comparison:
        lines += ["", f"minus {report.comparison.against}:"]
        lines += comparison_lines(report.comparison, len(report.languages))
    return "\n".join([*lines, *(["", *notes(report)] if notes(report) else [])])


def _row(name: str, group: GroupScore) -> dict[str, str]:
    right, wrong = (number(value, 2) for value in (group.reliability_right, group.reliability_wrong))
    return {
        "": name,
        "utterances": str(group.utterances),
        "hours": number(group.hours, 2),
        "WER % [95 % interval]": _rate(group.wer, group.wer_interval),
        "CER % [95 % interval]": _rate(group.cer, group.cer_interval),
        "language ID %": number(group.language_id_accuracy, 1),
        "reliability right": right,
        "reliability wrong": wrong,
    }


def _rate(value: float | None, low_high: Interval) -> str:
    if value is None or low_high is None:
        return number(value, 1)
    return f"{value:.1f} [{low_high[0]:.1f}, {low_high[1]:.1f}]"


def _difference(found: Difference) -> str:
    low, high = found.interval
    return f"{found.value:+.2f} points [{low:+.2f}, {high:+.2f}], p = {found.p_value:.3f}"


def _missing(report: ScoreReport, path: str, ids: list[str]) -> str:
    named = ", ".join(ids[:NAMED_AT_MOST]) + (", ..." if len(ids) > NAMED_AT_MOST else "")
    return f"warning: {path} lacks {len(ids)} of {report.pooled.utterances} utterances, counted as deletions: {named}"


def _width(text: str) -> int:
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)
