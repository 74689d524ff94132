"""Rescoring by whole texts, against a score that is computed step by step."""

import math
import random

import pytest

from mole_asr.decode.beam import Hypothesis, Weights
from mole_asr.decode.rescore import rescore, text_log_probs
from mole_asr.text.vocabulary import ByteVocabulary, Vocabulary

from .conftest import Make, slow_log_probs, slow_score


@pytest.mark.parametrize("vocabulary", [None, ByteVocabulary()])
def test_a_text_has_the_score_of_its_steps(make_lm: Make, vocabulary: Vocabulary | None) -> None:
    lm, rng = make_lm(vocabulary), random.Random(0)
    texts = ["".join(rng.choices("abcdef ", k=rng.randint(0, 9))).strip() for _ in range(66)]  # more than a batch
    scores = text_log_probs(lm, texts)
    for text, score in zip(texts, scores, strict=True):
        assert score == pytest.approx(slow_score(lm, lm.vocabulary.encode(text).tolist()), abs=1e-9)
    assert text_log_probs(lm, texts[:1]) == pytest.approx(scores[:1], abs=1e-9)
    assert text_log_probs(lm, []) == []


@pytest.mark.parametrize("window", [3, 100])
def test_a_letter_that_cannot_be_spelled_costs_8_bits_a_byte(make_lm: Make, window: int) -> None:
    lm = make_lm(window=window)
    text = "ab 日本 fed é"
    ids = [0, *lm.vocabulary.encode(text).tolist(), 0]
    assert ids.count(lm.vocabulary.unknown) == 2
    half, expected = max(1, window // 2), -8 * (3 + 3 + 2) * math.log(2)
    for target in range(1, len(ids)):
        start = 0 if target <= window else half * -(-(target - window) // half)
        if ids[target] != lm.vocabulary.unknown:
            expected += float(slow_log_probs(lm, ids[start:target])[ids[target]])
    assert text_log_probs(lm, [text])[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("window", [1, 2, 5, 6])
@pytest.mark.parametrize("length", [4, 5, 6, 7, 8, 9, 13])
def test_a_long_text_is_read_in_windows(make_lm: Make, window: int, length: int) -> None:
    """Each target once, from the part that begins at a multiple of half a window and gives it the longest past."""
    lm = make_lm(window=window)
    text = "abcdefabcdefa"[:length]
    ids = [0, *lm.vocabulary.encode(text).tolist(), 0]
    half, expected = max(1, window // 2), 0.0
    for target in range(1, len(ids)):
        start = 0 if target <= window else half * -(-(target - window) // half)
        expected += float(slow_log_probs(lm, ids[start:target])[ids[target]])
    assert text_log_probs(lm, [text])[0] == pytest.approx(expected, abs=1e-9)


def test_the_new_order(make_lm: Make) -> None:
    lm = make_lm()
    nbest = [Hypothesis((3,), -1.0, -2.0), Hypothesis((4, 5), -1.5, -1.0), Hypothesis((3, 2), -1.0, -2.0)]
    texts = ["a", "bc", "a"]
    weights = Weights(ngram=0.5, lm=2.0, bonus=0.25)
    found = rescore(nbest, texts, lm, weights)
    scores = dict(zip([each.ids for each in nbest], text_log_probs(lm, texts), strict=True))
    expected = {
        each.ids: each.acoustic + 0.5 * each.ngram + 2 * scores[each.ids] + 0.25 * len(each.ids) for each in nbest
    }
    assert [each.ids for each in found] == sorted(expected, key=lambda ids: -expected[ids])
    assert [each.total(weights) for each in found] == pytest.approx(sorted(expected.values(), reverse=True))
    alike = rescore([Hypothesis((4,), -1.0), Hypothesis((3,), -1.0)], ["", ""], lm, weights)
    assert [each.ids for each in alike] == [(3,), (4,)]  # by their tokens, however they came
