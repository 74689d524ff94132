"""Which utterances make which batch: a pure function of (lengths, languages, seed, epoch, world size).

Because nothing else enters, a run resumes in mid-epoch from two integers, the epoch and the next batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

# Longest over shortest utterance of a bucket. Inside a bucket rows are shuffled freely, so this trades padding
# against variety: 1.25 wastes about a tenth.
BUCKET_RATIO = 1.25


@dataclass(frozen=True)
class BatchPlan:
    """Batches of similar length, of bounded cost, and equally many on every rank and in every epoch.

    Utterances are sorted by the share of a batch that each takes, cut into buckets of similar length, shuffled inside
    the bucket and cut into batches. With temperature 1 every utterance comes exactly once an epoch; a larger one
    samples languages with p ~ hours^(1/temperature), keeping the hours of an epoch.

    Attributes:
        durations_s: float[N], seconds that each utterance may take (speed perturbation included).
        text_lengths: int[N], labels of each utterance.
        language_ids: int[N].
        batch_seconds: bound of (longest audio x utterances) of a batch.
        max_batch_labels: bound of (longest text x utterances) of a batch; None: no bound.
        seed: seed of the shuffling and the sampling.
        temperature: 1 = natural distribution of languages; larger = flatter; below 1 is refused.
        world_size: number of ranks.
        shuffle: False gives the same batches, longest first, in every epoch.
    """

    durations_s: np.ndarray
    text_lengths: np.ndarray
    language_ids: np.ndarray
    batch_seconds: float
    max_batch_labels: int | None = None
    seed: int = 0
    temperature: float = 1.0
    world_size: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not len(self.durations_s) == len(self.text_lengths) == len(self.language_ids):
            raise ValueError("durations_s, text_lengths and language_ids differ in length")
        if self.temperature < 1 or self.batch_seconds <= 0 or self.world_size < 1:
            raise ValueError("temperature and world_size must be at least 1, batch_seconds above 0")

    def batches(self, epoch: int, rank: int = 0) -> list[np.ndarray]:
        """The batches of one rank in one epoch.

        Returns:
            A list of `num_batches` arrays of positions int64[n] into the given arrays, sorted by language id, so that
            rows of one language are adjacent. Only an utterance that exceeds a bound alone exceeds it, alone.
        """
        rng = np.random.default_rng((self.seed, epoch))
        batches = self._make_even(self._cut(self._epoch_rows(rng), rng), self.num_batches * self.world_size, rng)
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return [rows[np.argsort(self.language_ids[rows], kind="stable")] for rows in batches[rank :: self.world_size]]

    @cached_property
    def num_batches(self) -> int:
        """Batches a rank and an epoch. Lightning asks once, before the first epoch, so every epoch has as many."""
        rng = np.random.default_rng((self.seed, 0))
        return -(-len(self._cut(self._epoch_rows(rng), rng)) // self.world_size)

    @cached_property
    def _shares(self) -> np.ndarray:
        """The share of a batch that each utterance takes: a batch is within bounds when n x largest share <= 1."""
        shares = np.asarray(self.durations_s, np.float64) / self.batch_seconds
        if self.max_batch_labels is not None:
            shares = np.maximum(shares, np.asarray(self.text_lengths, np.float64) / self.max_batch_labels)
        return np.maximum(shares, 1e-6)

    def _epoch_rows(self, rng: np.random.Generator) -> np.ndarray:
        """Rows of an epoch: each once, or each language repeated or thinned to its wanted share of the hours."""
        everything = np.arange(len(self.durations_s))
        if self.temperature == 1 or len(everything) == 0:
            return everything
        seconds = np.bincount(self.language_ids, weights=self.durations_s)
        wanted = np.where(seconds > 0, np.power(seconds, 1 / self.temperature), 0.0)
        repeats = seconds.sum() * wanted / wanted.sum() / np.maximum(seconds, 1e-9)
        chosen = []
        for language in np.flatnonzero(seconds):
            rows = everything[self.language_ids == language]
            whole, part = divmod(round(len(rows) * repeats[language]), len(rows))
            chosen += [np.repeat(rows, whole), rng.permutation(rows)[:part]]
        return np.concatenate(chosen)

    def _cut(self, rows: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Cuts rows into batches, longest first. The number of batches does not depend on the generator."""
        rows = rows[np.argsort(-self._shares[rows], kind="stable")]
        shares = self._shares[rows]
        batches, start = [], 0
        while start < len(rows):
            size = max(1, int(1 / shares[start] + 1e-9))
            similar = np.searchsorted(-shares, -shares[start] / BUCKET_RATIO, side="right") - start
            # Whole batches only: the last one takes some shorter rows from the next bucket.
            bucket = rows[start : start + -(-similar // size) * size]
            start += len(bucket)
            if self.shuffle:
                bucket = rng.permutation(bucket)
            batches += np.split(bucket, range(size, len(bucket), size))
        return batches

    def _make_even(self, batches: list[np.ndarray], count: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Makes exactly `count` batches: splits the largest in two, repeats if none can be split, drops surplus.

        Surplus comes only from resampled epochs (temperature > 1), where no utterance is promised a place.
        """
        batches = sorted(batches, key=len)
        while len(batches) < count:
            largest = batches.pop()
            halves = np.array_split(largest, 2) if len(largest) > 1 else [largest, largest]
            batches = sorted([*batches, *halves], key=len)
        if len(batches) > count:
            batches = [batches[i] for i in rng.permutation(len(batches))[:count]]
        return sorted(batches, key=lambda rows: -self._shares[rows].max())


@dataclass(frozen=True)
class Selection:
    """The rows of a manifest that are used, and how many were left out for which reason.

    Attributes:
        rows: int64[N] rows of the manifest.
        left_out: reason -> number of utterances.
        examples: reason -> row of the first of them.
    """

    rows: np.ndarray
    left_out: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)

    def without(self, reason: str, bad: np.ndarray) -> "Selection":
        """Leaves out the rows for which `bad` (bool, one for each row of the manifest) holds, counted as `reason`."""
        keep = ~bad[self.rows]
        if keep.all():
            return self
        left_out = {**self.left_out, reason: int((~keep).sum())}
        return Selection(self.rows[keep], left_out, {**self.examples, reason: int(self.rows[~keep][0])})

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items()) or "none"
        return f"{len(self.rows)} utterances used; left out: {reasons}"


def required_frames(labels: np.ndarray) -> int:
    """Frames that CTC needs at least for a label sequence int[U]: one a label and a blank between equal neighbours."""
    return len(labels) + int(np.count_nonzero(labels[1:] == labels[:-1]))
