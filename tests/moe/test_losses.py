import pytest
import torch

from mole_asr.moe import Experts, PackedRows, RoutingPlan, TopKRouter
from mole_asr.moe.losses import (
    cv_squared,
    importance_loss,
    language_loss,
    load_balance_loss,
    reliability_loss,
    router_z_loss,
)
from mole_asr.moe.statistics import expert_cost, loads_by_language, purity, routing_statistics

ROWS = PackedRows.from_lengths(torch.tensor([2, 4, 1]), 4)


def plan(ids: list[list[int]], num_experts: int, **aux: torch.Tensor) -> RoutingPlan:
    return RoutingPlan(torch.tensor(ids, dtype=torch.int32), torch.ones(len(ids), len(ids[0])), num_experts, aux=aux)


def test_load_balance_is_one_when_even_and_e_when_all_go_to_one() -> None:
    even = plan([[0], [1], [2]], 3, probabilities=torch.full((3, 3), 1 / 3))
    assert load_balance_loss(even) == pytest.approx(1)
    p_NE = torch.tensor([[1.0, 0, 0]] * 3, requires_grad=True)
    worst = load_balance_loss(plan([[0], [0], [0]], 3, probabilities=p_NE))
    assert float(worst.detach()) == pytest.approx(3)
    assert torch.autograd.grad(worst, p_NE)[0].abs().sum() > 0
    # Slots without an expert are no load.
    assert load_balance_loss(plan([[0, 3], [1, 3], [2, 3]], 3, probabilities=torch.full((3, 3), 1 / 3))) == (
        pytest.approx(1)
    )


def test_importance_and_z_loss_by_hand() -> None:
    gates = torch.tensor([[0.5, 0.5], [1.0, 9.0]], requires_grad=True)
    uneven = RoutingPlan(torch.tensor([[0, 1], [0, 2]], dtype=torch.int32), gates, 2)
    loss = importance_loss(uneven)  # importance 1.5 and 0.5: variance 0.25, mean 1
    assert float(loss.detach()) == pytest.approx(0.25)
    assert torch.autograd.grad(loss, gates)[0][1, 1] == 0
    assert cv_squared(torch.tensor([3.0])) == 0 and cv_squared(torch.zeros(4)) == 0
    z = router_z_loss(plan([[0], [0]], 2, logits=torch.tensor([[0.0, 0.0], [1.0, 1.0]])))
    assert float(z) == pytest.approx(((0.6931472**2) + 1.6931472**2) / 2)


def test_losses_of_no_rows_are_zero_and_not_nan() -> None:
    empty = TopKRouter(4, 3, 2)(torch.zeros(0, 4))
    for loss in (load_balance_loss, importance_loss, router_z_loss):
        assert float(loss(empty).detach()) == 0
    assert routing_statistics(empty, 0).load_E.tolist() == [0, 0, 0]


def test_language_loss_ignores_unknown_languages_and_padding() -> None:
    z_BN = torch.randn(3, 5)
    expected = torch.nn.functional.cross_entropy(z_BN[[0, 2]], torch.tensor([4, 1]))
    torch.testing.assert_close(language_loss(z_BN, torch.tensor([4, -1, 1]), ROWS), expected)
    assert language_loss(z_BN, torch.tensor([-1, -1, -1]), ROWS) == 0
    z_BTN = torch.randn(3, 4, 5)
    z_BTN[torch.arange(4) >= ROWS.lengths_B[:, None]] = torch.nan
    valid = torch.cat([z_BTN[0, :2], z_BTN[2, :1]])
    expected = torch.nn.functional.cross_entropy(valid, torch.tensor([4, 4, 1]))
    torch.testing.assert_close(language_loss(z_BTN, torch.tensor([4, -1, 1]), ROWS), expected)


def test_reliability_loss_asks_whether_the_prediction_was_right() -> None:
    z_BN = torch.eye(3).requires_grad_()
    head_B = torch.tensor([4.0, -4.0, 0.0], requires_grad=True)
    right, wrong = torch.tensor([0, 0, -1]), torch.tensor([1, 1, -1])
    low, high = (reliability_loss(head_B, z_BN, labels, ROWS) for labels in (right, wrong))
    assert low < 0.1 and high > 3
    gradients = torch.autograd.grad(high, [head_B, z_BN], allow_unused=True)
    assert gradients[0][2] == 0 and gradients[1] is None
    frames = reliability_loss(torch.zeros(3, 4), torch.randn(3, 4, 5), right, ROWS)
    assert float(frames.detach()) == pytest.approx(0.6931472)


def test_statistics_count_rows_and_not_segments() -> None:
    gates = torch.tensor([[0.5], [1.0], [0.9]])
    ids = torch.tensor([[0], [1], [4]], dtype=torch.int32)
    segment_plan = RoutingPlan(ids, gates, 4, "segment", torch.tensor([0, 3, 4, 9]))
    statistics = routing_statistics(segment_plan, 9)
    assert statistics.load_E.tolist() == [0.75, 0.25, 0, 0]
    assert float(statistics.reliability) == pytest.approx((3 * 0.5 + 1) / 4)
    assert float(statistics.experts_per_row) == pytest.approx(4 / 9)
    assert float(statistics.load_entropy) == pytest.approx(0.5623351 / 1.3862944)
    one = routing_statistics(plan([[0], [0]], 1), 2)
    assert float(one.load_entropy) == 0


def test_purity_by_language() -> None:
    loads_LE = loads_by_language(plan([[0], [0], [1], [1], [2]], 2), torch.tensor([0, 0, 1, 0, 1]), 2)
    assert loads_LE.tolist() == [[2, 1], [0, 1]]
    assert float(purity(loads_LE)) == 0.75
    unknown = loads_by_language(plan([[0], [1]], 2), torch.tensor([-1, 1]), 2)
    assert unknown.tolist() == [[0, 0], [0, 1]]


def test_cost_of_a_row() -> None:
    cost = expert_cost(Experts(5, 4, 8, "silu", shared=True), 1)
    one = 4 * 8 + 8 + 8 * 4 + 4
    assert (cost.total_parameters, cost.active_parameters) == (6 * one, 2 * one)
    assert cost.flops_per_row == 2 * 2 * (4 * 8 + 8 * 4)
    gated = expert_cost(Experts(5, 4, 8, "swiglu", bias=False), 1.5)
    assert gated.flops_per_row == 1.5 * 2 * 3 * 4 * 8
