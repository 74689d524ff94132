import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.score.bootstrap import difference, interval, percent, resampled_sums

counts = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=40).map(np.array)


def slow_rates(counts_N2: np.ndarray, resamples: int) -> list[float]:
    """The method in its plainest form: draw utterances, sum, divide."""
    generator, rates = random.Random(3), []
    for _ in range(resamples):
        drawn = [counts_N2[generator.randrange(len(counts_N2))] for _ in range(len(counts_N2))]
        rates.append(100 * sum(errors for errors, _ in drawn) / sum(length for _, length in drawn))
    return rates


def test_intervals_agree_with_a_slow_reference() -> None:
    generator = np.random.default_rng(5)
    counts_N2 = np.stack([generator.integers(0, 8, 60), generator.integers(1, 20, 60)], axis=1)
    sums = resampled_sums(counts_N2, seed=1, resamples=4000)
    low, high = interval(percent(sums[:, 0], sums[:, 1])) or (0, 0)
    slow_low, slow_high = np.percentile(slow_rates(counts_N2, 4000), [2.5, 97.5])
    assert abs(low - slow_low) < 0.08 * (slow_high - slow_low)
    assert abs(high - slow_high) < 0.08 * (slow_high - slow_low)


def test_the_interval_holds_the_true_rate_about_as_often_as_it_says() -> None:
    generator, held = np.random.default_rng(2), 0
    for trial in range(200):
        counts_N2 = np.stack([generator.binomial(10, 0.3, 50), np.full(50, 10)], axis=1)
        low, high = interval(percent(*resampled_sums(counts_N2, seed=trial, resamples=300).T)) or (0, 0)
        held += low <= 30 <= high
    assert 0.88 <= held / 200 <= 0.99


@settings(deadline=None, max_examples=50)
@given(counts, st.integers(0, 100))
def test_same_seed_same_sums_and_bounds_hold(counts_N2: np.ndarray, seed: int) -> None:
    sums = resampled_sums(counts_N2, seed, resamples=50)
    assert np.array_equal(sums, resampled_sums(counts_N2, seed, resamples=50))
    assert (sums <= len(counts_N2) * counts_N2.max(axis=0)).all()
    assert (sums >= len(counts_N2) * counts_N2.min(axis=0)).all()


@settings(deadline=None, max_examples=50)
@given(counts, st.integers(0, 100))
def test_identical_systems_do_not_differ(counts_N2: np.ndarray, seed: int) -> None:
    sums = resampled_sums(np.concatenate([counts_N2, counts_N2], axis=1), seed, resamples=50)
    found = difference(20.0, 20.0, percent(sums[:, 0], sums[:, 1]), percent(sums[:, 2], sums[:, 3]))
    assert (found.value, found.interval, found.p_value) == (0, (0, 0), 1)


def test_a_better_system_is_told_from_chance() -> None:
    generator = np.random.default_rng(0)
    lengths = np.full(200, 20)
    worse = generator.binomial(20, 0.3, 200)
    better, equal = np.maximum(worse - generator.integers(0, 2, 200), 0), generator.permutation(worse)
    sums = resampled_sums(np.stack([better, equal, worse, lengths], axis=1), seed=0)
    better_R, equal_R, worse_R = (percent(sums[:, column], sums[:, 3]) for column in range(3))
    found = difference(better.sum() / 40, worse.sum() / 40, better_R, worse_R)
    assert found.interval[1] < 0 and found.p_value < 0.01
    assert difference(30, 30, equal_R, worse_R).p_value > 0.1


def test_groups_of_equal_size_draw_independently() -> None:
    counts_N2 = np.stack([np.arange(30), np.ones(30)], axis=1)
    first, second = (resampled_sums(counts_N2, 0, name)[:, 0] for name in ("en", "fr"))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_blocks_do_not_change_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mole_asr.score.bootstrap._BLOCK", 7)
    sums = resampled_sums(np.ones((3, 2)), seed=0, resamples=11)
    assert np.array_equal(sums, np.full((11, 2), 3.0))


def test_no_reference_length_has_no_rate() -> None:
    rates = percent(np.array([2, 1]), np.array([0, 4]))
    assert np.isnan(rates[0]) and rates[1] == 25
    assert interval(np.array([np.nan])) is None
    assert interval(np.array([np.nan, 5.0])) == (5, 5)
