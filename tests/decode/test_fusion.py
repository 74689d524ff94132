"""Fusion reads a tree of prefixes in batches; a slow reference reads each prefix anew."""

import itertools
from functools import lru_cache

import numpy as np
import pytest

from mole_asr.decode.beam import Prefix, Weights, beam_search
from mole_asr.decode.fusion import FusionModel
from mole_asr.decode.ngram import TokenNgram
from mole_asr.text.checkpoint import LanguageModel
from mole_asr.text.policies import ExpertsConfig

from .conftest import Make, random_log_probs, slow_log_probs, slow_score

PIECES = 9
ALL = [*range(PIECES), 0]  # the end, behind the pieces, is the separator
POLICIES = {
    "dense": ExpertsConfig(),
    "top-1": ExpertsConfig("top_k", num_experts=4, top_k=1),
    "adaptive": ExpertsConfig("adaptive", num_experts=4, threshold=0.1),
    "post-moe": ExpertsConfig("forced", layers="last 1", top_k=2),
}


class SlowModel:
    """What `FusionModel` stands for: no tree, no batch, no cache."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.log_probs = lru_cache(maxsize=None)(self._log_probs)

    def read(self, prefixes: object) -> None:
        pass

    def keep(self, prefixes: object) -> None:
        pass

    def _log_probs(self, prefix: Prefix) -> np.ndarray:
        return slow_log_probs(self.lm, [0, *prefix])[ALL]


def grow(fusion: FusionModel, rng: np.random.Generator, steps: int) -> list[Prefix]:
    """Reads a random tree; returns its prefixes."""
    known: list[Prefix] = [()]
    fusion.read(known)
    for _ in range(steps):
        new = [(*known[rng.integers(len(known))], int(rng.integers(1, PIECES))) for _ in range(rng.integers(1, 6))]
        fusion.read(new)
        known += new
    return known


@pytest.mark.parametrize("policy", POLICIES)
def test_the_tree_knows_what_reading_anew_says(make_lm: Make, policy: str) -> None:
    lm = make_lm(experts=POLICIES[policy])
    fusion = FusionModel(lm, PIECES)
    known = grow(fusion, np.random.default_rng(1), 12)
    assert len({len(prefix) for prefix in known}) > 3
    for prefix in known:
        np.testing.assert_allclose(fusion.log_probs(prefix), SlowModel(lm).log_probs(prefix), atol=1e-12)


def test_what_is_kept_goes_on_as_before(make_lm: Make) -> None:
    lm, rng = make_lm(), np.random.default_rng(2)
    fusion = FusionModel(lm, PIECES)
    known = grow(fusion, rng, 30)
    kept = sorted({known[n] for n in rng.integers(len(known), size=6)} - {()})
    unread = [(*prefix, 4) for prefix in kept[:2] if (*prefix, 4) not in known]
    fusion.keep([*kept[2:], *unread])
    assert 0 < len(fusion) <= 6 < len(set(known))
    longer = unread + [(*prefix, token) for prefix in kept[2:] for token in (1, 5)]
    fusion.read(longer)
    for prefix in longer:
        np.testing.assert_allclose(fusion.log_probs(prefix), SlowModel(lm).log_probs(prefix), atol=1e-12)
    fusion.forget()
    assert len(fusion) == 0


def test_no_token_looks_back_further_than_a_window(make_lm: Make) -> None:
    lm = make_lm(window=4, layers=1)  # in one layer, what a token sees is all that there is to know of it
    fusion, prefix = FusionModel(lm, PIECES), tuple([2, 3, 4, 5, 6, 7, 8, 2, 3])
    for length in range(len(prefix) + 1):
        fusion.read([prefix[:length]])
    for length in range(len(prefix) + 1):
        expected = slow_log_probs(lm, [0, *prefix[:length]][-4:])[ALL]
        np.testing.assert_allclose(fusion.log_probs(prefix[:length]), expected, atol=1e-12)


@pytest.mark.parametrize("with_ngram", [False, True])
def test_the_search_finds_what_it_finds_with_the_slow_model(make_lm: Make, with_ngram: bool) -> None:
    """Many frames, so that what no beam holds any more is forgotten on the way."""
    lm, weights = make_lm(), Weights(ngram=0.3, lm=0.7, bonus=0.5)
    log_probs = [random_log_probs(frames, PIECES, seed) for seed, frames in enumerate((70, 9, 0, 20))]
    ngram = TokenNgram.count([[2, 3, 4], [5, 6]], PIECES, order=3) if with_ngram else None
    ngrams = [ngram, None, ngram, None]
    fusion = FusionModel(lm, PIECES)
    found = beam_search(log_probs, ngrams, fusion, weights, width=4)
    slow = beam_search(log_probs, ngrams, SlowModel(lm), weights, width=4)
    assert [[each.ids for each in nbest] for nbest in found] == [[each.ids for each in nbest] for nbest in slow]
    assert len(fusion) < 300  # most of the tree was forgotten
    for each in itertools.chain.from_iterable(found):
        assert each.lm == pytest.approx(slow_score(lm, list(each.ids)), abs=1e-9)
    for row, frames_TV in enumerate(log_probs):  # one utterance by itself
        fusion.forget()
        (alone,) = beam_search([frames_TV], [ngrams[row]], fusion, weights, width=4)
        assert [each.ids for each in alone] == [each.ids for each in found[row]]
        for one, other in zip(alone, found[row], strict=True):
            assert one.total(weights) == pytest.approx(other.total(weights), abs=1e-9)


def test_the_weight_decides(make_lm: Make) -> None:
    """Among all texts of two frames the best weighted sum wins; with weight 0 the model is not asked."""
    lm, weights = make_lm(), Weights(lm=1.5, bonus=1.0)
    frames_TV = random_log_probs(2, PIECES, 5)
    (nbest,) = beam_search([frames_TV], [None], FusionModel(lm, PIECES), weights, width=1000)
    sounds: dict[Prefix, list[float]] = {}
    for path in itertools.product(range(PIECES), repeat=2):
        text = tuple(v for v, _ in itertools.groupby(path) if v)
        sounds.setdefault(text, []).append(frames_TV[0, path[0]] + frames_TV[1, path[1]])
    totals = {
        text: float(np.logaddexp.reduce(each)) + 1.5 * slow_score(lm, list(text)) + len(text)
        for text, each in sounds.items()
    }
    assert nbest[0].ids == max(totals, key=lambda text: totals[text])
    assert [each.total(weights) for each in nbest] == sorted((each.total(weights) for each in nbest), reverse=True)
    for each in nbest:
        assert each.total(weights) == pytest.approx(
            totals[each.ids], abs=0.01
        )  # paths that are too unlikely are missing
    (unasked,) = beam_search([frames_TV], [None], SlowModel(None), Weights(lm=0.0), width=1000)  # type: ignore[arg-type]
    assert {each.lm for each in unasked} == {0.0}
    assert [each.ids for each in unasked] != [each.ids for each in nbest]
