"""The figures of a score as plain rows, one a language: what a recipe keeps in its results.json."""

from typing import Any

from mole_asr.score.language_id import language_id
from mole_asr.score.score import ScoreReport
from mole_asr.score.scripts import wrong_script_share


def language_rows(report: ScoreReport) -> list[dict[str, Any]]:
    """A row a language, and one with the language "all" for all utterances together.

    Returns:
        Rows of `language`; `wer`, `cer` and `language_id_accuracy` in percent; `words` and `word_errors`; `ece` and the
        mean reliability where the language was found (`reliability_right`) and where not; `wrong_script_share`, from 0
        to 1. None stands for what the transcripts do not say.
    """
    languages = [pair.language for pair in report.pairs]
    places = {code: [n for n, other in enumerate(languages) if other == code] for code in report.languages}
    return [_row(report, code, chosen) for code, chosen in {**places, "all": list(range(len(languages)))}.items()]


def _row(report: ScoreReport, language: str, places: list[int]) -> dict[str, Any]:
    pairs, counts_4 = [report.pairs[n] for n in places], report.counts_N4[places].sum(0)
    found = language_id(pairs)
    return {
        "language": language,
        "wer": _rounded(100 * counts_4[0] / counts_4[1] if counts_4[1] else None, 3),
        "cer": _rounded(100 * counts_4[2] / counts_4[3] if counts_4[3] else None, 3),
        "words": int(counts_4[1]),
        "word_errors": int(counts_4[0]),
        "language_id_accuracy": _rounded(found.language_id_accuracy, 2),
        "ece": _rounded(found.ece, 4),
        "reliability_right": _rounded(found.reliability_right, 4),
        "reliability_wrong": _rounded(found.reliability_wrong, 4),
        "wrong_script_share": _rounded(wrong_script_share(pairs), 5),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(float(value), digits)
