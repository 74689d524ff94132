from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.decode.ngram import NGRAM_FILE, TokenNgram, load_ngrams, save_ngrams
from mole_asr.errors import MoleError

TEXTS = [[1, 2, 3], [1, 2, 4], [2, 2]]


@given(
    texts=st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=5),
    history=st.lists(st.integers(0, 5), max_size=8),
    order=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_probabilities_sum_to_one(texts: list[list[int]], history: list[int], order: int) -> None:
    log_probs = TokenNgram.count(texts, vocab_size=6, order=order).log_probs(history)
    assert log_probs.shape == (7,) and np.isfinite(log_probs).all()
    assert np.exp(log_probs).sum() == pytest.approx(1)


def test_witten_bell_by_hand() -> None:
    model = TokenNgram.count([[1, 1, 2]], vocab_size=3, order=2)
    # Four tokens (1 1 2 end) of three kinds; below them four alike.
    unigram = (np.array([0, 2, 1, 1]) + 3 * 0.25) / (4 + 3)
    np.testing.assert_allclose(np.exp(model.log_probs([0])), unigram)
    # Behind 1: once 1, once 2; two kinds.
    np.testing.assert_allclose(np.exp(model.log_probs([2, 1])), (np.array([0, 1, 1, 0]) + 2 * unigram) / 4)
    # At the start: once 1.
    np.testing.assert_allclose(np.exp(model.log_probs([])), (np.array([0, 1, 0, 0]) + unigram) / 2)


def test_what_was_read_is_likely() -> None:
    model = TokenNgram.count(TEXTS, vocab_size=5)
    assert model.log_probs([1]).argmax() == 2
    assert model.log_probs([1, 2, 3]).argmax() == 5, "the end"
    assert model.log_probs([0, 1, 2]).argmax() in (3, 4), "an unknown history counts by its newest part"


def test_pieces_that_came_later_change_nothing(tmp_path: Path) -> None:
    model = TokenNgram.count(TEXTS, vocab_size=5)
    save_ngrams({"en": model}, tmp_path)
    wider = load_ngrams(tmp_path, 8)["en"]
    for history in ([], [1], [1, 2, 3], [4, 4]):
        old, new = model.log_probs(history), wider.log_probs(history)
        np.testing.assert_array_equal(new[[0, 1, 2, 3, 4, 8]], old)
        assert (new[5:8] == -np.inf).all()
    assert np.isfinite(wider.log_probs([6])[:5]).all(), "behind a piece that it does not know"


def test_saved_and_read_again(tmp_path: Path) -> None:
    models = {"en": TokenNgram.count(TEXTS, 5), "no": TokenNgram.count([], 5)}
    save_ngrams(models, tmp_path)
    again = load_ngrams(tmp_path, 5)
    assert set(again) == {"en", "no"}
    for history in ([], [1], [1, 2], [4, 4]):
        np.testing.assert_array_equal(again["en"].log_probs(history), models["en"].log_probs(history))
    with pytest.raises(MoleError, match=r"ngrams\.safetensors: not the n-grams of a model .*5 of 4 pieces"):
        load_ngrams(tmp_path, 4)
    save_ngrams({"en": TokenNgram(5, np.array([[1, 7, 2]], np.int32), np.array([1], np.int32))}, tmp_path)
    with pytest.raises(MoleError, match=r"ngrams\.safetensors: .*ids beyond 5"):
        load_ngrams(tmp_path, 5)
    save_ngrams({}, tmp_path)
    assert load_ngrams(tmp_path, 5) == {}, "another model's are gone"
    (tmp_path / NGRAM_FILE).write_bytes(b"nonsense")
    with pytest.raises(MoleError, match=r"ngrams\.safetensors"):
        load_ngrams(tmp_path, 5)
