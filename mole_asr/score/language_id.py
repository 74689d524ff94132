"""How often the language was recognised, and how far the reliability can be believed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mole_asr.score.pairs import UNKNOWN_LANGUAGE, Pair

BINS = 10


@dataclass(frozen=True, slots=True)
class LanguageId:
    """Language identification of a group of utterances; None where the hypotheses do not tell.

    `language_id_accuracy` is in percent; `reliability_right` and `reliability_wrong` are the mean reliability
    (0 to 1) of utterances whose language was recognised and was not; `ece` is the expected calibration error (0 to 1).
    """

    language_id_accuracy: float | None = None
    reliability_right: float | None = None
    reliability_wrong: float | None = None
    ece: float | None = None


def split_reliability(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Reliability of the utterances that have one, and whether their language was recognised.

    Returns:
        reliability float64 [M] and right bool [M].
    """
    known = [pair for pair in _named(pairs) if pair.reliability is not None]
    reliability = np.array([pair.reliability for pair in known], dtype=np.float64)
    return reliability, np.array([pair.hypothesis_language == pair.language for pair in known], dtype=bool)


def language_id(pairs: Sequence[Pair]) -> LanguageId:
    """Compares the hypotheses' languages with the references'.

    Utterances without a hypothesis, whose hypothesis has no field `language`, or whose reference names none are left
    out; an empty language (the recogniser heard no speech) is wrong. Where the language was given to the recogniser,
    the accuracy says nothing.
    """
    named = [pair.hypothesis_language == pair.language for pair in _named(pairs)]
    reliability, right = split_reliability(pairs)
    return LanguageId(
        language_id_accuracy=100 * sum(named) / len(named) if named else None,
        reliability_right=_mean(reliability[right]),
        reliability_wrong=_mean(reliability[~right]),
        ece=calibration_error(reliability, right),
    )


def calibration_error(reliability: np.ndarray, right: np.ndarray) -> float | None:
    """Expected calibration error over ten bins of equal width (Guo et al., ICML 2017).

    The mean over bins of |share right - mean reliability|, weighted by the utterances in the bin.

    Args:
        reliability: between 0 and 1, [M].
        right: whether the language was right, [M].

    Returns:
        Between 0 and 1, or None where M is 0.
    """
    if not len(reliability):
        return None
    bins = np.clip((reliability * BINS).astype(int), 0, BINS - 1)
    gaps = np.bincount(bins, weights=right - reliability, minlength=BINS)  # a bin's size x (accuracy - reliability)
    return float(np.abs(gaps).sum() / len(reliability))


def _named(pairs: Sequence[Pair]) -> list[Pair]:
    """Those whose reference and hypothesis both say the language."""
    return [pair for pair in pairs if pair.hypothesis_language is not None and pair.language != UNKNOWN_LANGUAGE]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
