import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.decode.beam import Hypothesis, Weights, beam_search
from mole_asr.decode.ngram import TokenNgram

from .conftest import random_log_probs


def best(log_probs_TV: np.ndarray, ngram: TokenNgram | None = None, **options: Any) -> tuple[int, ...]:
    return beam_search([log_probs_TV], [ngram], **options)[0][0].ids


def every_text(log_probs_TV: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of each text, by going through all paths."""
    found: dict[tuple[int, ...], float] = {}
    T, V = log_probs_TV.shape
    for path in itertools.product(range(V), repeat=T):
        text = tuple(v for v, _ in itertools.groupby(path) if v)
        score = math.exp(sum(log_probs_TV[t, v] for t, v in enumerate(path)))
        found[text] = found.get(text, 0.0) + score
    return found


@given(frames=st.integers(1, 5), vocab=st.integers(2, 4), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_most_likely_text_is_found(frames: int, vocab: int, seed: int) -> None:
    log_probs_TV = random_log_probs(frames, vocab, seed)
    texts = every_text(log_probs_TV)
    found = best(log_probs_TV, width=1000)
    assert texts[found] == pytest.approx(max(texts.values()), rel=2e-2)


@given(frames=st.integers(1, 4), seed=st.integers(0, 10**6), weight=st.floats(0.01, 2), bonus=st.floats(0, 2))
@settings(max_examples=60, deadline=None)
def test_the_best_sum_with_the_ngrams_is_found(frames: int, seed: int, weight: float, bonus: float) -> None:
    ngram = TokenNgram.count([[1, 2, 1], [2, 2], [1]], vocab_size=3, order=3)
    log_probs_TV = random_log_probs(frames, 3, seed)

    def total(text: tuple[int, ...], probability: float) -> float:
        steps = [float(ngram.log_probs(text[:i])[(*text, 3)[i]]) for i in range(len(text) + 1)]
        return math.log(probability) + weight * sum(steps) + bonus * len(text)

    totals = {text: total(text, p) for text, p in every_text(log_probs_TV).items()}
    found = best(log_probs_TV, ngram, weights=Weights(ngram=weight, bonus=bonus), width=1000)
    assert totals[found] == pytest.approx(max(totals.values()), abs=5e-2)


def test_ngrams_decide_between_sounds_alike() -> None:
    log_probs_TV = np.log(np.array([[0.02, 0.96, 0.01, 0.01], [0.96, 0.02, 0.01, 0.01], [0.02, 0.01, 0.47, 0.5]]))
    ngram = TokenNgram.count([[1, 2]] * 5, vocab_size=4)
    assert best(log_probs_TV) == (1, 3)
    assert best(log_probs_TV, ngram) == (1, 2)


def test_no_frame_gives_no_token() -> None:
    assert beam_search([np.zeros((0, 5))], [None]) == [[Hypothesis((), 0.0)]]
    assert beam_search([], []) == []
