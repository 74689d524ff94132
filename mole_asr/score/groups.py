"""Error rates of groups of utterances, and their mean over languages."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import jiwer
import numpy as np

from mole_asr.score.bootstrap import Difference, difference, interval, percent, resampled_sums
from mole_asr.score.language_id import LanguageId, language_id
from mole_asr.score.pairs import Pair

# Columns of the counts; a second system's four columns follow the first's. A length follows its errors.
WORD_ERRORS, WORDS, CHARACTER_ERRORS, CHARACTERS = range(4)
METRICS = {"wer": WORD_ERRORS, "cer": CHARACTER_ERRORS}

Interval = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class GroupScore(LanguageId):
    """The figures of one row: a language, a speaker, all utterances together, or the mean over languages.

    Rates are in percent, and None where the references hold no words at all; `hours` is None where durations are
    missing. `words` and `characters` are reference lengths.
    """

    utterances: int = 0
    hours: float | None = None
    words: int = 0
    characters: int = 0
    wer: float | None = None
    cer: float | None = None
    wer_interval: Interval = None
    cer_interval: Interval = None


class Rates(Protocol):
    """Something that has error rates: `errors` is a column of the counts."""

    def rate(self, errors: int) -> float:
        """Percent; NaN without a reference."""
        ...

    def samples(self, errors: int) -> np.ndarray:
        """The same rate of each resample, [R]."""
        ...


class Group:
    """Some utterances with their resampled sums, drawn once and used for every figure."""

    def __init__(self, name: str, pairs: Sequence[Pair], counts_NC: np.ndarray, seed: int) -> None:
        self.name, self.pairs = name, pairs
        self.sums_C = counts_NC.sum(axis=0)
        self.samples_RC = resampled_sums(counts_NC, seed, name)

    def rate(self, errors: int) -> float:
        """Percent; NaN without a reference."""
        return float(percent(self.sums_C[errors], self.sums_C[errors + 1]))

    def samples(self, errors: int) -> np.ndarray:
        """The same rate of each resample, [R]."""
        return percent(self.samples_RC[:, errors], self.samples_RC[:, errors + 1])

    def score(self) -> GroupScore:
        """All figures of the group."""
        durations_s = [pair.duration_s for pair in self.pairs if pair.duration_s is not None]
        return GroupScore(
            utterances=len(self.pairs),
            hours=sum(durations_s) / 3600 if len(durations_s) == len(self.pairs) else None,
            words=int(self.sums_C[WORDS]),
            characters=int(self.sums_C[CHARACTERS]),
            **_figures(self),
            **asdict(language_id(self.pairs)),
        )


class Macro:
    """The mean over groups. A group that lacks a figure is left out of that figure's mean.

    Each group draws its own resamples, so the interval keeps every language's size.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups

    def rate(self, errors: int) -> float:
        """Percent; NaN where no group has a reference."""
        return float(_mean_known(np.array([[group.rate(errors)] for group in self.groups]))[0])

    def samples(self, errors: int) -> np.ndarray:
        """The same rate of each resample, [R]."""
        return _mean_known(np.stack([group.samples(errors) for group in self.groups]))

    def score(self) -> GroupScore:
        """Sums of utterances, hours and lengths; means of everything else."""
        scores = [group.score() for group in self.groups]
        hours = [score.hours for score in scores if score.hours is not None]
        means: dict[str, Any] = {
            key.name: _mean([getattr(score, key.name) for score in scores]) for key in fields(LanguageId)
        }
        return GroupScore(
            utterances=sum(score.utterances for score in scores),
            hours=sum(hours) if len(hours) == len(scores) else None,
            words=sum(score.words for score in scores),
            characters=sum(score.characters for score in scores),
            **_figures(self),
            **means,
        )


def count_errors(pairs: Sequence[Pair]) -> np.ndarray:
    """Counts errors and reference lengths with jiwer.

    Returns:
        int64 [N, 4]: word errors, reference words, character errors, reference characters of each utterance.
    """
    references, hypotheses = [pair.reference for pair in pairs], [pair.hypothesis for pair in pairs]
    columns: list[list[int]] = []
    for process in (jiwer.process_words, jiwer.process_characters):
        output: Any = process(references, hypotheses)
        columns.append([_errors(chunks) for chunks in output.alignments])
        columns.append([len(units) for units in output.references])
    return np.array(columns, dtype=np.int64).T


def make_groups(
    pairs: Sequence[Pair], counts_NC: np.ndarray, seed: int, key: Callable[[Pair], str]
) -> dict[str, Group]:
    """Groups the utterances by `key`, in the order of the names."""
    rows: dict[str, list[int]] = {}
    for row, pair in enumerate(pairs):
        rows.setdefault(key(pair), []).append(row)
    return {name: Group(name, [pairs[row] for row in rows[name]], counts_NC[rows[name]], seed) for name in sorted(rows)}


def differences(rates: Rates) -> dict[str, Difference]:
    """Compares the first system with the second one, by metric; the counts must have the columns of both."""
    return {
        metric: difference(rates.rate(c), rates.rate(c + 4), rates.samples(c), rates.samples(c + 4))
        for metric, c in METRICS.items()
    }


def _figures(rates: Rates) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric, column in METRICS.items():
        rate = rates.rate(column)
        found[metric] = None if np.isnan(rate) else rate
        found[f"{metric}_interval"] = interval(rates.samples(column))
    return found


def _errors(chunks: Sequence[Any]) -> int:
    lengths = ((c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx) for c in chunks if c.type != "equal")
    return sum(max(length) for length in lengths)  # a substitution is as long on both sides


def _mean_known(rates_LR: np.ndarray) -> np.ndarray:
    known_LR = ~np.isnan(rates_LR)
    return percent(np.where(known_LR, rates_LR, 0).sum(axis=0), known_LR.sum(axis=0)) / 100


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
