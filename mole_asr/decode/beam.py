"""CTC prefix beam search with a token n-gram model, a neural language model, or both: n-best lists.

Letters: T frames, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mole_asr.decode.ngram import TokenNgram

BLANK = 0
NEVER = -math.inf
# Tokens less likely than this in a frame (natural logarithm) are not tried there, and no more than so many.
LEAST_LIKELY = -6.0
MOST_TOKENS = 8
# Prefixes whose score is so much lower than the best one's are dropped. This and LEAST_LIKELY halve the time; with -8
# and without a limit the 225 dev texts of recipes/prompts5 are the same, of the 244 test texts three, all long, differ.
FARTHEST = 10.0
# Prefixes kept after each frame. This and the weights were chosen on the dev split of recipes/prompts5.
BEAM = 32
# Frames after which a language model may forget what no beam holds any more.
_FRAMES_KEPT = 64

Prefix = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each part of a score counts; the sound counts 1.

    Attributes:
        ngram: of the n-gram model's logarithm; 0 leaves it out.
        lm: of the neural language model's logarithm; 0 leaves it out.
        bonus: for each token, because a language model takes something off for each; without any it is not given.
    """

    ngram: float = 0.4
    lm: float = 0.0
    bonus: float = 0.9


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A token sequence that a search has found, and the parts of its score, natural logarithms without weights.

    Attributes:
        ids: the tokens.
        acoustic: of the sum over the CTC paths that the search has seen.
        ngram: of the tokens and their end by the n-gram model; 0 without one.
        lm: of the tokens and their end by the neural language model; 0 without one.
    """

    ids: Prefix
    acoustic: float
    ngram: float = 0.0
    lm: float = 0.0

    def total(self, weights: Weights) -> float:
        """The weighted sum, with the bonus."""
        return self.acoustic + weights.ngram * self.ngram + weights.lm * self.lm + weights.bonus * len(self.ids)


class PrefixModel(Protocol):
    """A language model that shares the recogniser's tokens, asked for many prefixes at once."""

    def read(self, prefixes: Iterable[Prefix]) -> None:
        """Makes `log_probs` of these possible; each is empty, or one token behind one that was read before."""

    def log_probs(self, prefix: Prefix) -> np.ndarray:
        """Natural logarithms float64[V + 1] of what follows a prefix; the last one is the end."""

    def keep(self, prefixes: Iterable[Prefix]) -> None:
        """Forgets all but these; of those not read yet, all but what they follow."""


@dataclass(slots=True)
class _Prefix:
    """Log-probability of all paths of a prefix that end in its last token or in a blank, and its language scores."""

    token: float = NEVER
    blank: float = NEVER
    ngram: float = 0.0
    lm: float = 0.0
    language: float = 0.0

    @property
    def acoustic(self) -> float:
        return _add(self.token, self.blank)


def beam_search(
    log_probs: Sequence[np.ndarray],
    ngrams: Sequence[TokenNgram | None],
    lm: PrefixModel | None = None,
    weights: Weights = Weights(),
    width: int = BEAM,
) -> list[list[Hypothesis]]:
    """Finds likely token sequences: sum over CTC paths, plus weighted language models, plus a bonus a token.

    Prefix search after Hannun et al., 2014 (arXiv 1408.2873), with shallow fusion at every token. The utterances go
    side by side, frame by frame, so that the language model reads the new prefixes of all of them at once.

    Args:
        log_probs: of each utterance, float [T, V] natural logarithms; id 0 is the blank.
        ngrams: of each utterance, the model of its language, or None.
        lm: a neural language model, or None.
        weights: of the parts.
        width: prefixes that are kept after each frame.

    Returns:
        Of each utterance, the hypotheses that were kept, the best first; alike ones are ordered by their tokens.
    """
    lm = lm if weights.lm else None
    searches = [
        _Search(frames_TV, ngram if weights.ngram else None, lm, weights, width)
        for frames_TV, ngram in zip(log_probs, ngrams, strict=True)
    ]
    for frame in range(max((len(search.frames_TV) for search in searches), default=0)):
        running = [search for search in searches if frame < len(search.frames_TV)]
        tokens = [search.likely(frame) for search in running]
        if lm is not None:
            if frame % _FRAMES_KEPT == 0 and frame:
                lm.keep(prefix for search in searches for prefix in search.beam)
            lm.read(prefix for search, some in zip(running, tokens, strict=True) if some for prefix in search.beam)
        for search, some in zip(running, tokens, strict=True):
            search.step(frame, some)
    if lm is not None:
        lm.read(prefix for search in searches for prefix in search.beam)
    return [search.hypotheses() for search in searches]


class _Search:
    """The beam of one utterance."""

    def __init__(
        self, frames_TV: np.ndarray, ngram: TokenNgram | None, lm: PrefixModel | None, weights: Weights, width: int
    ) -> None:
        self.frames_TV, self.ngram, self.lm, self.weights, self.width = frames_TV, ngram, lm, weights, width
        self.bonus = weights.bonus if ngram is not None or lm is not None else 0.0
        self.beam: dict[Prefix, _Prefix] = {(): _Prefix(blank=0.0)}

    def likely(self, frame: int) -> list[tuple[int, float]]:
        """Tokens that are tried in a frame, with their log-probabilities."""
        frame_V = self.frames_TV[frame]
        likely = np.argpartition(-frame_V, min(MOST_TOKENS, len(frame_V) - 1))[: MOST_TOKENS + 1]
        return [(int(v), float(frame_V[v])) for v in likely if v != BLANK and frame_V[v] > LEAST_LIKELY]

    def step(self, frame: int, tokens: list[tuple[int, float]]) -> None:
        """One more frame: prefixes stay as they were (blank, or their last token goes on), or get one token longer."""
        frame_V = self.frames_TV[frame]
        blank = float(frame_V[BLANK])
        grown: dict[Prefix, _Prefix] = {}
        for ids, old in self.beam.items():
            acoustic = old.acoustic
            same = grown.setdefault(ids, _Prefix(ngram=old.ngram, lm=old.lm, language=old.language))
            same.blank = _add(same.blank, acoustic + blank)
            if ids:
                same.token = _add(same.token, old.token + float(frame_V[ids[-1]]))
            if tokens:
                self._extend(grown, ids, old, acoustic, tokens)
        # Their order decides between equal ones: two prefixes are never compared.
        scores = ((-prefix.acoustic - prefix.language, place) for place, prefix in enumerate(grown.values()))
        best = sorted(scores)[: self.width]
        items, limit = list(grown.items()), best[0][0] + FARTHEST
        self.beam = dict(items[place] for cost, place in best if cost <= limit)

    def _extend(
        self, grown: dict[Prefix, _Prefix], ids: Prefix, old: _Prefix, acoustic: float, tokens: list[tuple[int, float]]
    ) -> None:
        """Adds what a prefix becomes with one more token."""
        ngram_V = self.ngram.log_probs(ids) if self.ngram is not None else None
        lm_V = self.lm.log_probs(ids) if self.lm is not None else None
        for token, log_prob in tokens:
            # The same token once more is a new one only behind a blank.
            before = old.blank if ids and ids[-1] == token else acoustic
            if before == NEVER:
                continue
            longer = grown.get((*ids, token))
            if longer is None:
                ngram = 0.0 if ngram_V is None else float(ngram_V[token])
                lm = 0.0 if lm_V is None else float(lm_V[token])
                score = self.weights.ngram * ngram + self.weights.lm * lm + self.bonus
                longer = _Prefix(ngram=old.ngram + ngram, lm=old.lm + lm, language=old.language + score)
                grown[(*ids, token)] = longer
            longer.token = _add(longer.token, before + log_prob)

    def hypotheses(self) -> list[Hypothesis]:
        """The beam, with the scores of an end, in its final order."""
        found = []
        for ids, prefix in self.beam.items():
            ngram = 0.0 if self.ngram is None else prefix.ngram + float(self.ngram.log_probs(ids)[-1])
            lm = 0.0 if self.lm is None else prefix.lm + float(self.lm.log_probs(ids)[-1])
            found.append(Hypothesis(ids, prefix.acoustic, ngram, lm))
        weights = Weights(self.weights.ngram, self.weights.lm, self.bonus)
        return sorted(found, key=lambda hypothesis: (-hypothesis.total(weights), hypothesis.ids))


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))
