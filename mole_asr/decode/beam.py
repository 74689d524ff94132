"""CTC prefix beam search with a token n-gram model.

Letters: T frames, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np

from mole_asr.decode.ngram import TokenNgram

BLANK = 0
NEVER = -math.inf
# Tokens less likely than this in a frame (natural logarithm) are not tried there, and no more than so many.
LEAST_LIKELY = -8.0
MOST_TOKENS = 8
# Prefixes kept after each frame. This, weight and bonus were chosen on the dev split of recipes/prompts5.
BEAM = 32


@dataclass(slots=True)
class _Prefix:
    """Log-probability of all paths of a prefix that end in its last token or in a blank, and its language score."""

    token: float = NEVER
    blank: float = NEVER
    language: float = 0.0

    @property
    def acoustic(self) -> float:
        return _add(self.token, self.blank)


def beam_ctc(
    log_probs_TV: np.ndarray,
    ngram: TokenNgram | None = None,
    weight: float = 0.4,
    bonus: float = 0.9,
    width: int = BEAM,
) -> list[int]:
    """Finds a likely token sequence: sum over its CTC paths, plus weight x n-gram score, plus bonus a token.

    Prefix search after Hannun et al., 2014 (arXiv 1408.2873), with shallow fusion at every token.

    Args:
        log_probs_TV: natural logarithms; id 0 is the blank.
        ngram: model of the language; None: the CTC paths alone decide, and weight and bonus count for nothing.
        weight: of the n-gram model's logarithm.
        bonus: for each token, because the n-gram model takes something off for each.
        width: prefixes that are kept after each frame.

    Returns:
        Token ids.
    """
    if ngram is None:
        weight = bonus = 0.0
    beam: dict[tuple[int, ...], _Prefix] = {(): _Prefix(blank=0.0)}
    for frame_V in log_probs_TV:
        likely = np.argpartition(-frame_V, min(MOST_TOKENS, len(frame_V) - 1))[: MOST_TOKENS + 1]
        tokens = [(int(v), float(frame_V[v])) for v in likely if v != BLANK and frame_V[v] > LEAST_LIKELY]
        grown = _extend(beam, float(frame_V[BLANK]), frame_V, tokens, ngram, weight, bonus)
        best = sorted(grown.items(), key=lambda item: -(item[1].acoustic + item[1].language))
        beam = dict(best[:width])

    def total(item: tuple[tuple[int, ...], _Prefix]) -> float:
        ids, prefix = item
        end = weight * float(ngram.log_probs(ids)[-1]) if ngram is not None else 0.0
        return prefix.acoustic + prefix.language + end

    return list(max(beam.items(), key=total)[0])


def _extend(
    beam: dict[tuple[int, ...], _Prefix],
    blank: float,
    frame_V: np.ndarray,
    tokens: list[tuple[int, float]],
    ngram: TokenNgram | None,
    weight: float,
    bonus: float,
) -> dict[tuple[int, ...], _Prefix]:
    """All prefixes after one more frame: as they were (blank, or their last token goes on), or one token longer."""
    grown: dict[tuple[int, ...], _Prefix] = {}
    for ids, old in beam.items():
        acoustic = old.acoustic
        same = grown.setdefault(ids, _Prefix(language=old.language))
        same.blank = _add(same.blank, acoustic + blank)
        if ids:
            same.token = _add(same.token, old.token + float(frame_V[ids[-1]]))
        follow = ngram.log_probs(ids) if ngram is not None and tokens else None
        for token, log_prob in tokens:
            # The same token once more is a new one only behind a blank.
            before = old.blank if ids and ids[-1] == token else acoustic
            if before == NEVER:
                continue
            longer = grown.get((*ids, token))
            if longer is None:
                score = weight * float(follow[token]) + bonus if follow is not None else 0.0
                longer = grown[(*ids, token)] = _Prefix(language=old.language + score)
            longer.token = _add(longer.token, before + log_prob)
    return grown


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))
