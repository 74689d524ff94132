"""Token n-grams of the training texts, one model a language: what is likely to be spelled next.

Letters: M distinct n-grams, O order, V vocabulary.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mole_asr.errors import MoleError
from mole_asr.files import atomic_path

NGRAM_FILE = "ngrams.safetensors"
"""In the folder of a model."""
ORDER = 6
_CACHE_BYTES = 64_000_000  # of each language
START = -1  # stands before the first token; the end is the id V


class TokenNgram:
    """An interpolated n-gram model (Witten & Bell, 1991).

    p(w | h) = (count(h w) + kinds(h) p(w | h')) / (count(h) + kinds(h)), where kinds(h) is the number of different
    tokens seen behind the history h, and h' is h without its oldest token. Below the empty history all are alike.

    Args:
        vocab_size: V; ids are 0..V-1.
        ngrams_MO: int32, distinct n-grams of the highest order; texts are padded with `START` in front.
        counts_M: how often each was seen.
        known: V when the texts were counted, the id that stands for their end; later pieces are never expected.
    """

    def __init__(self, vocab_size: int, ngrams_MO: np.ndarray, counts_M: np.ndarray, known: int | None = None) -> None:
        self.vocab_size, self.ngrams_MO, self.counts_M = vocab_size, ngrams_MO, counts_M
        self.known = vocab_size if known is None else known
        self.order = ngrams_MO.shape[1]
        self.probabilities = lru_cache(maxsize=max(1000, _CACHE_BYTES // (8 * (self.known + 1))))(self._probabilities)

    @classmethod
    def count(cls, texts: Iterable[Iterable[int]], vocab_size: int, order: int = ORDER) -> "TokenNgram":
        """Counts the n-grams of token sequences."""
        found: Counter[tuple[int, ...]] = Counter()
        for ids in texts:
            padded = [START] * (order - 1) + [int(i) for i in ids] + [vocab_size]
            found.update(tuple(padded[i : i + order]) for i in range(len(padded) - order + 1))
        ngrams_MO = np.array(list(found), np.int32).reshape(-1, order)
        return cls(vocab_size, ngrams_MO, np.array(list(found.values()), np.int32))

    @cached_property
    def _counts(self) -> dict[tuple[int, ...], Counter[int]]:
        """What was seen behind each history of up to O - 1 tokens; worked out when a language is first decoded."""
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for ngram, count in zip(self.ngrams_MO.tolist(), self.counts_M.tolist(), strict=True):
            for length in range(self.order):
                counts[tuple(ngram[self.order - 1 - length : -1])][ngram[-1]] += count
        return counts

    def log_probs(self, text: Sequence[int]) -> np.ndarray:
        """Natural logarithms float64[V + 1] of what follows a text so far; the last one is the end."""
        padded = [START] * (self.order - 1) + list(text[-self.order + 1 :] if self.order > 1 else [])
        history = tuple(padded[len(padded) - self.order + 1 :])
        while history and history not in self._counts:  # one that was never seen says what a shorter one does
            history = history[1:]
        logs = np.log(self.probabilities(history))
        if self.known == self.vocab_size:
            return logs
        return np.concatenate([logs[:-1], np.full(self.vocab_size - self.known, -np.inf), logs[-1:]])

    def _probabilities(self, history: tuple[int, ...]) -> np.ndarray:
        size = self.known + 1
        shorter = self.probabilities(history[1:]) if history else np.full(size, 1 / size)
        seen = self._counts.get(history)
        if not seen:
            return shorter
        mixed = len(seen) * shorter
        mixed[list(seen)] += list(seen.values())
        return mixed / (sum(seen.values()) + len(seen))


def save_ngrams(models: Mapping[str, TokenNgram], folder: str | Path) -> None:
    """Writes the n-grams of some languages into the folder of a model; without any, what is there goes."""
    path, tensors = Path(folder) / NGRAM_FILE, {}
    if not models:
        path.unlink(missing_ok=True)
        return
    for language, model in models.items():
        tensors[f"{language}.ngrams"] = model.ngrams_MO
        tensors[f"{language}.counts"] = model.counts_M
        tensors[f"{language}.pieces"] = np.array([model.known], np.int32)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load_ngrams(folder: str | Path, vocab_size: int) -> dict[str, TokenNgram]:
    """Reads what `save_ngrams` wrote, by language; a model need not have any.

    Args:
        folder: of the model.
        vocab_size: V of the model.

    Raises:
        MoleError: the file cannot be read.
    """
    path = Path(folder) / NGRAM_FILE
    if not path.exists():
        return {}
    try:
        tensors = load_file(path)
        languages = [name.removesuffix(".ngrams") for name in tensors if name.endswith(".ngrams")]
        models = {}
        for name in languages:
            known = int(tensors.get(f"{name}.pieces", np.array([vocab_size]))[0])
            ngrams_MO, counts_M = tensors[f"{name}.ngrams"], tensors[f"{name}.counts"]
            if ngrams_MO.ndim != 2 or len(ngrams_MO) != len(counts_M) or not known <= vocab_size:
                raise ValueError(f"{name}: {ngrams_MO.shape}, {counts_M.shape}, {known} of {vocab_size} pieces")
            if ngrams_MO.size and not START <= ngrams_MO.min() <= ngrams_MO.max() <= known:
                raise ValueError(f"{name}: ids beyond {known}")
            models[name] = TokenNgram(vocab_size, ngrams_MO, counts_M, known)
        return models
    except Exception as error:  # safetensors raises its own kind, a missing key another
        raise MoleError(f"{path}: not the n-grams of a model ({error}); train the model anew, or delete it") from None
