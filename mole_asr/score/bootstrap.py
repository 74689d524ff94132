"""Bootstrap intervals of error rates: utterances are drawn again with replacement, and the rate is taken anew.

Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.

Shape letters: N utterances, R resamples, C columns of counts (errors and lengths of one or two systems).
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

RESAMPLES = 1000
_BLOCK = 1_000_000  # utterances drawn at once: bounds the memory to some 16 MB


def resampled_sums(counts_NC: np.ndarray, seed: int, name: str = "", resamples: int = RESAMPLES) -> np.ndarray:
    """Sums of the columns over utterances drawn with replacement.

    All columns of one resample see the same draw, so two systems side by side are compared in pairs.

    Args:
        counts_NC: counts an utterance, N >= 1.
        seed: any integer of 0 or more.
        name: tells groups apart, so that two groups never share their draws and one's draws never depend on another.
        resamples: R.

    Returns:
        sums_RC, float64.
    """
    size = len(counts_NC)
    rng = np.random.default_rng([seed, crc32(name.encode())])
    sums_RC = np.empty((resamples, counts_NC.shape[1]))
    block = max(1, _BLOCK // size)
    for start in range(0, resamples, block):
        # How often each utterance is drawn; the matrix product then sums without gathering.
        times_RN = rng.multinomial(size, np.full(size, 1 / size), size=min(block, resamples - start))
        sums_RC[start : start + block] = times_RN.astype(np.float64) @ counts_NC
    return sums_RC


def percent(errors: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Error rates in percent; NaN where the length is 0."""
    rates = np.full(np.shape(lengths), np.nan)
    return 100 * np.divide(errors, lengths, out=rates, where=np.asarray(lengths) > 0)


def interval(samples_R: np.ndarray) -> tuple[float, float] | None:
    """The central 95 % of the samples (percentile method); None where no sample is a number."""
    samples = samples_R[~np.isnan(samples_R)]
    if not len(samples):
        return None
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Difference:
    """A rate minus the other system's, in percentage points: negative is better than the other.

    `p_value` is two-sided: how likely a difference of this size or more is if the systems are equally good.
    """

    value: float
    interval: tuple[float, float]
    p_value: float


def difference(rate: float, other_rate: float, samples_R: np.ndarray, other_samples_R: np.ndarray) -> Difference:
    """Compares two systems whose samples come from the same draws (paired bootstrap)."""
    samples = samples_R - other_samples_R
    samples = samples[~np.isnan(samples)]
    # The sample itself counts as one draw, so p is never 0.
    tail = min(np.sum(samples <= 0), np.sum(samples >= 0))
    p_value = min(1.0, 2 * (tail + 1) / (len(samples) + 1))
    low_high = interval(samples) or (0.0, 0.0)
    return Difference(rate - other_rate, low_high, float(p_value))
