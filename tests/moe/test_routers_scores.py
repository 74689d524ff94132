import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.moe import AdaptiveRouter, ExpertChoiceRouter, NoisyTopKRouter, PackedRows, RoutingContext, TopKRouter
from mole_asr.moe.routers.base import top_k


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), max_size=6), st.integers(1, 5))
def test_top_k_takes_the_highest_first_and_of_equal_ones_the_first(scores: list[list[int]], k: int) -> None:
    scores_NE = torch.tensor(scores, dtype=torch.float32).view(-1, 5)
    ids_NK = top_k(scores_NE, k)
    assert torch.equal(scores_NE.gather(1, ids_NK), scores_NE.sort(descending=True).values[:, :k])
    assert all(len(set(ids)) == k for ids in ids_NK.tolist())
    if k <= 2:
        assert torch.equal(ids_NK, scores_NE.sort(descending=True, stable=True).indices[:, :k])


@pytest.mark.parametrize("renormalize", [True, False])
def test_top_k_takes_the_highest_scores(renormalize: bool) -> None:
    router = TopKRouter(6, 5, 2, renormalize)
    x_ND = torch.randn(30, 6)
    plan = router(x_ND)
    scores_NE = x_ND @ router.scores.weight.t()
    p_NE = scores_NE.softmax(-1)
    for ids, gates, p_E in zip(plan.expert_ids.long(), plan.gates, p_NE, strict=True):
        assert set(ids.tolist()) == set(p_E.topk(2).indices.tolist())
        expected = p_E[ids] / (p_E[ids].sum() if renormalize else 1)
        torch.testing.assert_close(gates, expected)
    torch.testing.assert_close(plan.aux["probabilities"], p_NE)
    assert torch.autograd.grad(plan.gates.square().sum(), router.scores.weight)[0].abs().sum() > 0


def test_top_k_with_all_experts_one_expert_and_no_rows() -> None:
    every = TopKRouter(6, 5, 5)(torch.randn(4, 6))
    torch.testing.assert_close(every.gates.sum(-1), torch.ones(4))
    assert TopKRouter(6, 1, 1)(torch.randn(4, 6)).gates.tolist() == [[1.0]] * 4
    assert TopKRouter(6, 5, 2, shared_expert=True)(torch.randn(0, 6)).shared_gates.shape == (0,)
    for k in (0, 6):
        with pytest.raises(ValueError, match=r"1\.\.5"):
            TopKRouter(6, 5, k)


def test_top_k_noise_only_in_training_and_scores_in_float32_under_autocast() -> None:
    router = TopKRouter(6, 5, 1, noise_std=10.0)
    x_ND = torch.randn(50, 6)
    assert not torch.equal(router(x_ND).expert_ids, router(x_ND).expert_ids)
    router.eval()
    plain = router(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x_ND).gates, plain.gates)


def noisy(std: float, temperature: float = 1.0) -> NoisyTopKRouter:
    """A router whose noise has one strength for rows of positive numbers."""
    router = NoisyTopKRouter(6, 5, 2, temperature)
    with torch.no_grad():
        router.noise.weight.fill_(std)
    return router


def test_learned_noise_moves_the_choice_in_training_alone() -> None:
    router, x_ND = noisy(1.0), torch.rand(400, 6)
    rows = PackedRows.from_lengths(torch.tensor([400]), 400)

    def draw(seed: int):
        return router(x_ND, RoutingContext(rows, generator=torch.Generator().manual_seed(seed)))

    plan = draw(0)
    assert torch.equal(plan.expert_ids, draw(0).expert_ids) and not torch.equal(plan.expert_ids, draw(1).expert_ids)
    expected_NE = torch.nn.functional.softplus(x_ND.sum(-1, keepdim=True).expand(-1, 5))
    torch.testing.assert_close(plan.aux["noise_std"], expected_NE)
    standard_NE = (plan.aux["noisy_logits"] - plan.aux["logits"]) / expected_NE
    assert abs(float(standard_NE.mean().detach())) < 0.1 and 0.9 < float(standard_NE.std().detach()) < 1.1
    assert torch.autograd.grad(plan.gates[:, 0].sum(), router.noise.weight)[0].abs().sum() > 0
    still = router.eval()(x_ND)
    assert set(still.aux) == {"logits", "probabilities"}
    torch.testing.assert_close(still.aux["logits"], x_ND @ router.scores.weight.t())


def test_temperature_changes_the_weights_and_not_the_choice() -> None:
    x_ND = torch.randn(30, 6)
    router = NoisyTopKRouter(6, 5, 2).eval()
    plain = router(x_ND)
    for temperature in (0.5, 2.5):
        router.temperature = temperature
        plan = router(x_ND)
        assert torch.equal(plan.expert_ids, plain.expert_ids)
        chosen_NK = plan.aux["logits"].gather(1, plan.expert_ids.long())
        torch.testing.assert_close(plan.gates, (chosen_NK / temperature).softmax(-1))
    with pytest.raises(ValueError, match="temperature must be positive"):
        NoisyTopKRouter(6, 5, 2, temperature=0)


def test_the_gap_decides_between_one_expert_and_two() -> None:
    router = AdaptiveRouter(6, 5, threshold=0.2)
    x_ND = torch.randn(300, 6)
    plan = router(x_ND)
    p_NE = (x_ND @ router.scores.weight.t()).softmax(-1)
    best = p_NE.topk(2)
    alone_N = best.values[:, 0] - best.values[:, 1] > 0.2
    assert 20 < int(alone_N.sum()) < 280
    assert plan.expert_ids[:, 0].tolist() == best.indices[:, 0].tolist()
    assert plan.expert_ids[:, 1].tolist() == best.indices[:, 1].where(~alone_N, 5).tolist()
    torch.testing.assert_close(plan.gates, torch.stack([best.values[:, 0], best.values[:, 1].where(~alone_N, 0)], 1))
    summed = AdaptiveRouter(6, 5, threshold=0.2, renormalize=True)
    summed.load_state_dict(router.state_dict())
    again = summed(x_ND)
    torch.testing.assert_close(again.gates, plan.gates / plan.gates.sum(-1, keepdim=True))
    assert torch.equal(again.expert_ids, plan.expert_ids)


def test_a_router_that_has_diverged_is_not_silent() -> None:
    router = AdaptiveRouter(4, 3)
    torch.nn.init.constant_(next(router.parameters()), torch.nan)
    plan = router(torch.randn(5, 4))
    assert (plan.expert_ids < 3).all() and plan.gates.isnan().all()


@pytest.mark.parametrize("renormalize", [True, False])
def test_threshold_zero_is_top_1_and_one_is_top_2(renormalize: bool) -> None:
    x_ND = 30 * torch.randn(200, 6)  # some rows are certain: p1 - p2 is exactly one
    for threshold, k in ((0.0, 1), (1.0, 2)):
        router, usual = AdaptiveRouter(6, 5, threshold, renormalize), TopKRouter(6, 5, k, renormalize)
        usual.load_state_dict(router.state_dict())
        adaptive, expected = router(x_ND), usual(x_ND)
        assert torch.equal(adaptive.expert_ids[:, :k], expected.expert_ids)
        assert (adaptive.expert_ids[:, k:] == 5).all()
        torch.testing.assert_close(adaptive.gates[:, :k], expected.gates)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"threshold must lie in 0\.\.1"):
            AdaptiveRouter(6, 5, bad)


@pytest.mark.parametrize(
    ("num_rows", "capacity", "rows_an_expert"), [(20, 2.0, 8), (21, 1.0, 5), (3, 5.0, 3), (1, 0.5, 1)]
)
def test_each_expert_chooses_its_best_rows(num_rows: int, capacity: float, rows_an_expert: int) -> None:
    router = ExpertChoiceRouter(6, 5, capacity)
    x_ND = torch.randn(num_rows, 6)
    plan = router(x_ND)
    p_NE = (x_ND @ router.scores.weight.t()).softmax(-1)
    assert plan.top_k == 5
    for expert in range(5):
        chosen = (plan.expert_ids[:, expert] == expert).nonzero().flatten().tolist()
        assert sorted(chosen) == sorted(p_NE[:, expert].topk(rows_an_expert).indices.tolist())
        torch.testing.assert_close(plan.gates[chosen, expert], p_NE[chosen, expert])
        assert set(plan.expert_ids[:, expert].tolist()) <= {expert, 5}
    for bad in (0, 5.5):
        with pytest.raises(ValueError, match="capacity must lie above 0"):
            ExpertChoiceRouter(6, 5, bad)


@pytest.mark.parametrize("router", [TopKRouter(6, 5, 1), AdaptiveRouter(6, 5), ExpertChoiceRouter(6, 5)])
def test_routers_of_rows_say_that_they_need_them(router: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(router).__name__} needs rows"):
        router(None)
