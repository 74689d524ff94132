import pytest
import torch

from mole_asr.moe import AdaptiveRouter, Experts, RoutingPlan, TopKRouter
from mole_asr.moe.statistics import expert_cost, loads_by_language, purity, routing_statistics


def plan(ids: list[list[int]], num_experts: int) -> RoutingPlan:
    return RoutingPlan(torch.tensor(ids, dtype=torch.int32), torch.ones(len(ids), len(ids[0])), num_experts)


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


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_the_flop_meter_is_top_2_less_half_the_share_of_one_expert_rows(activation: str, threshold: float) -> None:
    experts, x_ND = Experts(5, 6, 8, activation), torch.randn(300, 6)
    adaptive, top_2 = AdaptiveRouter(6, 5, threshold), TopKRouter(6, 5, 2)
    found, usual = (routing_statistics(router(x_ND), 300) for router in (adaptive, top_2))
    assert usual.several_share == 1 and usual.experts_per_row == 2
    one_expert = 1 - float(found.several_share)
    assert {0.0: one_expert == 1, 1.0: one_expert == 0}.get(threshold, 0 < one_expert < 1)
    flops, most = (expert_cost(experts, float(s.experts_per_row)).flops_per_row for s in (found, usual))
    assert flops / most == pytest.approx(1 - 0.5 * one_expert)
    parameters, most_parameters = (
        expert_cost(experts, float(s.experts_per_row)).active_parameters for s in (found, usual)
    )
    assert parameters / most_parameters == pytest.approx(1 - 0.5 * one_expert)


def test_slots_without_expert_are_in_no_figure_whatever_their_gates() -> None:
    gates = torch.tensor([[0.5, torch.nan], [0.25, 0.75], [torch.nan, torch.nan]])
    ids = torch.tensor([[1, 3], [0, 1], [3, 3]], dtype=torch.int32)
    statistics = routing_statistics(RoutingPlan(ids, gates, 3), 3)
    assert float(statistics.reliability) == pytest.approx(0.5)
    assert float(statistics.several_share) == pytest.approx(1 / 3)
    assert float(statistics.experts_per_row) == 1
