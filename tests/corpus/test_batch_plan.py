from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.corpus.batch_plan import BatchPlan, Selection, required_frames


@st.composite
def plans(draw, temperatures=(1.0, 2.0, 5.0), world_sizes=(1, 2, 3, 8)) -> BatchPlan:
    count = draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return BatchPlan(
        durations_s=rng.lognormal(0.5, 1.0, count).clip(0.1, 25).astype(np.float32),
        text_lengths=rng.integers(1, 80, count),
        language_ids=rng.choice(4, count, p=[0.7, 0.2, 0.07, 0.03]).astype(np.int16),
        batch_seconds=draw(st.sampled_from([10.0, 30.0, 100.0])),
        max_batch_labels=draw(st.sampled_from([None, 60, 400])),
        seed=draw(st.integers(0, 5)),
        temperature=draw(st.sampled_from(temperatures)),
        world_size=draw(st.sampled_from(world_sizes)),
        shuffle=draw(st.booleans()),
    )


def all_batches(plan: BatchPlan, epoch: int) -> list[np.ndarray]:
    return [rows for rank in range(plan.world_size) for rows in plan.batches(epoch, rank)]


@given(plans(), st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_every_rank_and_epoch_has_equally_many_nonempty_batches(plan: BatchPlan, epoch: int) -> None:
    for rank in range(plan.world_size):
        batches = plan.batches(epoch, rank)
        assert len(batches) == plan.num_batches
        assert all(len(rows) for rows in batches)


@given(plans(), st.integers(0, 50))
@settings(max_examples=150, deadline=None)
def test_cost_is_bounded_except_for_one_utterance_alone(plan: BatchPlan, epoch: int) -> None:
    for rows in all_batches(plan, epoch):
        if len(rows) > 1:
            assert plan.durations_s[rows].max() * len(rows) <= plan.batch_seconds * (1 + 1e-6)
            if plan.max_batch_labels is not None:
                assert plan.text_lengths[rows].max() * len(rows) <= plan.max_batch_labels


@given(plans(temperatures=(1.0,), world_sizes=(1,)), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_every_utterance_comes_exactly_once(plan: BatchPlan, epoch: int) -> None:
    assert sorted(np.concatenate(all_batches(plan, epoch))) == list(range(len(plan.durations_s)))


@given(plans(temperatures=(1.0,)), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_ranks_are_disjoint_and_lose_nothing(plan: BatchPlan, epoch: int) -> None:
    counts = Counter(np.concatenate(all_batches(plan, epoch)).tolist())
    assert set(counts) == set(range(len(plan.durations_s)))
    # Only when there are fewer utterances than ranks in the last round must a rank be given one a second time.
    if plan.num_batches * plan.world_size <= len(plan.durations_s):
        assert max(counts.values()) == 1


@given(plans(), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_a_plan_is_a_pure_function(plan: BatchPlan, epoch: int) -> None:
    twin = BatchPlan(**{name: getattr(plan, name) for name in BatchPlan.__dataclass_fields__})
    plan.batches(epoch + 1)  # an earlier call must not matter
    for rank in range(plan.world_size):
        for rows, twin_rows in zip(plan.batches(epoch, rank), twin.batches(epoch, rank), strict=True):
            np.testing.assert_array_equal(rows, twin_rows)


@given(plans(), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_rows_of_a_language_are_adjacent(plan: BatchPlan, epoch: int) -> None:
    for rows in all_batches(plan, epoch):
        assert (np.diff(plan.language_ids[rows]) >= 0).all()


def corpus_plan(**settings: object) -> BatchPlan:
    """Durations like those of read prompts: 1,000 utterances of three languages, one of them rare."""
    rng = np.random.default_rng(7)
    languages = rng.choice(3, 1000, p=[0.75, 0.2, 0.05])
    durations_s = rng.lognormal(0.5, 0.8, 1000).clip(0.3, 20)
    return BatchPlan(durations_s, durations_s * 12, languages, batch_seconds=60.0, **settings)  # type: ignore[arg-type]


def test_little_of_a_batch_is_padding() -> None:
    plan = corpus_plan()
    batches = plan.batches(0)
    padded_s = sum(plan.durations_s[rows].max() * len(rows) for rows in batches)
    assert plan.durations_s.sum() / padded_s > 0.88
    assert padded_s / (plan.batch_seconds * len(batches)) > 0.85


def test_epochs_and_seeds_differ_and_batches_mix() -> None:
    plan = corpus_plan()
    first, second = ({tuple(rows) for rows in plan.batches(epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 4
    assert {tuple(rows) for rows in corpus_plan(seed=1).batches(0)} != first
    longest = [plan.durations_s[rows].max() for rows in plan.batches(0)]
    assert longest != sorted(longest, reverse=True), "batches come in the order of length"


def test_without_shuffling_every_epoch_is_the_same_longest_first() -> None:
    plan = corpus_plan(shuffle=False)
    for rows, later in zip(plan.batches(0), plan.batches(3), strict=True):
        np.testing.assert_array_equal(rows, later)
    longest = [plan.durations_s[rows].max() for rows in plan.batches(0)]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_languages_are_sampled_by_their_hours(temperature: float) -> None:
    plan = corpus_plan(temperature=temperature)
    hours = np.bincount(plan.language_ids, weights=plan.durations_s)
    wanted = hours ** (1 / temperature) / (hours ** (1 / temperature)).sum()
    drawn = np.zeros(3)
    for epoch in range(20):
        rows = np.concatenate(plan.batches(epoch))
        drawn += np.bincount(plan.language_ids[rows], weights=plan.durations_s[rows], minlength=3)
    np.testing.assert_allclose(drawn / drawn.sum(), wanted, atol=0.02)
    np.testing.assert_allclose(drawn.sum() / 20, hours.sum(), rtol=0.03)


def test_a_repeated_language_repeats_evenly() -> None:
    plan = corpus_plan(temperature=4.0)
    counts = Counter(np.concatenate(plan.batches(0)).tolist())
    rare = [counts[row] for row in np.flatnonzero(plan.language_ids == 2)]
    assert max(rare) - min(rare) <= 2  # one by construction, one for a surplus batch that was dropped


@pytest.mark.parametrize("bad", [{"temperature": 0.5}, {"world_size": 0}, {"batch_seconds": 0.0}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    one = np.ones(1)
    with pytest.raises(ValueError, match="at least 1"):
        BatchPlan(**{"durations_s": one, "text_lengths": one, "language_ids": one, "batch_seconds": 1.0, **bad})


def test_required_frames_counts_blanks_between_equal_labels() -> None:
    assert required_frames(np.array([5, 5, 5, 7])) == 6
    assert required_frames(np.array([], np.int32)) == 0


def test_selection_counts_what_it_leaves_out() -> None:
    selection = Selection(np.arange(10)).without("odd", np.arange(10) % 2 == 1).without("never", np.zeros(10, bool))
    selection = selection.without("below 5", np.arange(10) < 5)
    assert selection.rows.tolist() == [6, 8]
    assert str(selection) == "2 utterances used; left out: 5 odd, 3 below 5"
