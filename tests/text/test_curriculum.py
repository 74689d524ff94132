"""The order of the curriculum against a slow reference, and what it does when little is known."""

import numpy as np
import pytest
import torch

from mole_asr.moe.plan import RoutingPlan
from mole_asr.text.curriculum import Complexities, curriculum_order, two_expert_shares


def slow_order(vectors: list[list[float]]) -> list[int]:
    """The paper's steps, one pair at a time."""

    def fewest() -> int:
        best = 0
        for place, vector in enumerate(vectors):
            if sum(vector) < sum(vectors[best]):
                best = place
        return best

    first = fewest()
    length = sum(x * x for x in vectors[first]) ** 0.5
    keys = []
    for place, vector in enumerate(vectors):
        if length == 0:
            key = -sum(vector) / len(vector)
        else:
            dot = sum(x * y for x, y in zip(vector, vectors[first], strict=True))
            key = round(dot / length / sum(x * x for x in vector) ** 0.5, 9)
        keys.append((-key, place) if place != first else (-np.inf, place))
    if length == 0:
        keys[first] = (0.0, first)
    return [place for _, place in sorted(keys)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("zeros", [0, 1, 5])
def test_the_order_is_that_of_the_slow_reference(seed: int, zeros: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.integers(1, 9, (20, 3)) / 8
    shares[rng.choice(20, zeros, replace=False)] = 0
    assert curriculum_order(shares).tolist() == slow_order(shares.tolist())


def test_a_case_by_hand() -> None:
    shares = np.array([[0.9, 0.1], [0.2, 0.2], [0.1, 0.0], [0.8, 0.0], [0.0, 0.5]])
    assert curriculum_order(shares).tolist() == [2, 3, 0, 1, 4]
    assert curriculum_order(np.zeros((0, 2))).tolist() == []


def test_shares_are_those_of_tokens_with_two_experts() -> None:
    ids = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 3], [0, 2], [1, 0]], dtype=torch.int32)  # 3: no expert
    plan = RoutingPlan(ids, torch.ones(6, 2), 3)
    one = RoutingPlan(ids[:, :1].clamp(max=2), torch.ones(6, 1), 3)
    assert two_expert_shares([plan, one], 2).tolist() == pytest.approx(np.array([[1 / 3, 0], [2 / 3, 0]]))


def test_an_epoch_follows_what_the_one_before_left() -> None:
    complexities, rows = Complexities(4), np.array([3, 0, 2, 1])
    assert complexities.order(0, rows).tolist() == [3, 0, 2, 1]
    complexities.record(0, torch.tensor([0, 3]), torch.tensor([[0.5], [0.9]]))
    assert complexities.order(0, rows).tolist() == [3, 0, 2, 1], "an epoch does not change while it runs"
    assert complexities.order(1, rows).tolist() == [0, 3, 2, 1], "what was not seen comes last"
    complexities.record(0, torch.tensor([1, 2]), torch.tensor([[0.0], [0.1]]))
    assert complexities.order(1, rows).tolist() == [1, 2, 0, 3]
    complexities.record(1, torch.tensor([3]), torch.tensor([[0.05]]))
    assert complexities.order(1, rows).tolist() == [1, 2, 0, 3]
    assert complexities.order(2, rows).tolist() == [1, 3, 2, 0], "what was seen earlier stays known"
    again = Complexities(4)
    again.load_state_dict(complexities.state_dict())
    assert again.order(1, rows).tolist() == [1, 2, 0, 3]
    assert again.order(2, rows).tolist() == [1, 3, 2, 0]
    fewer = Complexities(3)
    fewer.load_state_dict(complexities.state_dict())
    assert fewer.order(2, np.array([2, 0])).tolist() == [2, 0], "of other windows nothing is known"
    complexities.record(2, torch.tensor([0]), torch.tensor([[0.0]]))
    assert set(complexities.state_dict()) == {"1", "2"}, "older ones are done with"
