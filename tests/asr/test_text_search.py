"""The search of the text decoder against a slow one that recomputes everything."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_asr.asr.text_search import Prior, TextSearch, cut_loop

END = 4


def search(
    chances: Callable[[list[int]], list[float]], beam: int, limit: int, end: int, prior: Prior = lambda ids, whole: 0.0
) -> tuple[list[int], float]:
    """The best text and its mean log-probability, with its prior, all of it computed anew in each step.

    Args:
        chances: log-probabilities of the tokens behind a text.
        beam: texts that go on.
        limit: of the tokens of a text.
        end: the end sign.
        prior: of a text.
    """

    def total(ids: list[int]) -> float:
        return sum(chances(ids[:place])[token] for place, token in enumerate(ids))

    def mean(ids: list[int]) -> float:
        return (total([*ids, end]) + prior(ids, True)) / (len(ids) + 1)

    going, ended = [list[int]()], list[list[int]]()
    while len(ended) < beam:
        if len(going[0]) == limit:
            ended += going
            break
        totals = [total(ids) for ids in going]
        behind = zip(totals, going, map(chances, going), strict=True)
        longer = [
            (before + chance + prior([*ids, n][: len(ids) + (n != end)], n == end), ids, n)
            for before, ids, row in behind
            for n, chance in enumerate(row)
        ]
        going = []
        for _, ids, token in sorted(longer, key=lambda each: -each[0]):
            body = ids if token == end else [*ids, token]
            (ended if token == end or cut_loop(body) else going).append(body)
            if beam in (len(going), len(ended)):
                break
    best = max(ended, key=mean)
    return best, mean(best)


def markov(seed: int) -> Callable[[list[int]], list[float]]:
    """Chances that the last two tokens decide."""
    logits = 2.0 * np.random.default_rng(seed).standard_normal((END + 1, END + 1, END + 1))
    table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return lambda ids: table[tuple([END, END, *ids][-2:])].tolist()


def run(chances: Callable[[list[int]], list[float]], beam: int, limit: int, prior: Prior | None = None) -> TextSearch:
    """Lets the search step to its end."""
    texts = TextSearch(beam, limit, END, prior)
    while True:
        rows = [chances(draft.ids) for draft in texts.drafts]
        best_KC = [sorted(range(END + 1), key=lambda token, row=row: -row[token])[: 2 * beam] for row in rows]
        log_probs_KC = [[row[token] for token in best_C] for row, best_C in zip(rows, best_KC, strict=True)]
        if not texts.step(best_KC, log_probs_KC, [row[END] for row in rows]):
            return texts


@given(seed=st.integers(0, 10**6), beam=st.integers(1, 4), limit=st.integers(1, 12))
def test_a_search_equals_one_that_recomputes_everything(seed: int, beam: int, limit: int) -> None:
    found, score = run(markov(seed), beam, limit).best
    ids, mean = search(markov(seed), beam, limit, END)
    assert found.ids == ids
    assert found.mean_log_prob == score == pytest.approx(mean)


@given(seed=st.integers(0, 10**6), beam=st.integers(3, 4), limit=st.integers(1, 12))
def test_so_does_one_with_a_prior(seed: int, beam: int, limit: int) -> None:
    """Three drafts at least: all tokens are candidates then."""

    def prior(ids: list[int], whole: bool) -> float:
        return float(np.random.default_rng([seed, whole, *ids]).normal(0, 2))

    chances = markov(seed)
    found, score = run(chances, beam, limit, prior).best
    ids, wanted = search(chances, beam, limit, END, prior)
    assert found.ids == ids
    assert score == pytest.approx(wanted)
    assert found.mean_log_prob == pytest.approx(wanted - prior(ids, True) / (len(ids) + 1))


def test_a_wider_search_finds_what_is_likelier() -> None:
    means = {beam: [run(markov(seed), beam, 8).best[1] for seed in range(50)] for beam in (1, 4)}
    assert np.mean(means[4]) > np.mean(means[1]) + 0.05


def test_drafts_that_go_on_differ_and_name_whom_they_continue() -> None:
    chances, texts = markov(3), TextSearch(3, 20, END)
    before = [draft.ids for draft in texts.drafts]
    for _ in range(6):
        rows = [chances(draft.ids) for draft in texts.drafts]
        parents = texts.step([list(range(END + 1))] * len(rows), rows, [row[END] for row in rows])
        if not parents:
            break
        assert [draft.ids[:-1] for draft in texts.drafts] == [before[parent] for parent in parents]
        before = [draft.ids for draft in texts.drafts]
        assert all(first != second for first, second in itertools.combinations(before, 2))


@pytest.mark.parametrize(
    ("ids", "left"),
    [
        ("abcabcabc", "abc"),  # three copies, nine tokens
        ("xyabcabcabc", "xyabc"),
        ("ababab", None),  # six tokens: somebody may say that
        ("abababab", "ab"),
        ("aaaaaaa", None),
        ("aaaaaaaa", "a"),
        ("abcabcab", None),
        ("abcabcabcx", None),  # it has ended
        ("", None),
    ],
)
def test_a_loop_ends_the_text(ids: str, left: str | None) -> None:
    numbers = [ord(letter) for letter in ids]
    assert cut_loop(numbers) == (left is not None)
    assert "".join(map(chr, numbers)) == (ids if left is None else left)
