import math

import pytest
import torch
from torch import Tensor

from mole_asr.moe import LanguageRouter, PackedRows, RoutingContext, TopKRouter

LENGTHS = torch.tensor([3, 1, 4])


def context(logits: Tensor, **kwargs) -> RoutingContext:
    return RoutingContext(PackedRows.from_lengths(LENGTHS, 4), logits, **kwargs)


def random_logits() -> Tensor:
    return torch.randn(3, 5, dtype=torch.float64, requires_grad=True)


def test_max_posterior_is_the_probability_of_the_chosen_language() -> None:
    z_BN = random_logits()
    plan = LanguageRouter(5, temperature=2.0)(None, context(z_BN))
    p_BN = (z_BN / 2).softmax(-1)
    assert plan.layout == "segment" and plan.segments.tolist() == [0, 3, 4, 8]
    assert plan.expert_ids[:, 0].tolist() == z_BN.argmax(-1).tolist()
    torch.testing.assert_close(plan.gates[:, 0], p_BN.amax(-1))
    torch.testing.assert_close(plan.shared_gates, 1 - p_BN.amax(-1))
    torch.testing.assert_close(plan.aux["reliability"], plan.gates[:, 0])


def test_entropy_reliability_is_one_when_certain_and_zero_when_not() -> None:
    z_BN = torch.tensor([[50.0, 0, 0, 0, 0], [1.0, 1, 1, 1, 1], [1.0, 1, -50, -50, -50]])
    plan = LanguageRouter(5, "entropy")(None, context(z_BN))
    expected = torch.tensor([[1.0], [0.0], [1 - math.log(2) / math.log(5)]])
    torch.testing.assert_close(plan.gates, expected, atol=1e-6, rtol=0)


def test_sigmoid_reliability_comes_from_its_own_head() -> None:
    head_B = torch.tensor([0.0, 2.0, -1.0], requires_grad=True)
    z_BN = random_logits()
    plan = LanguageRouter(5, "sigmoid")(None, context(z_BN, reliability_logits=head_B))
    torch.testing.assert_close(plan.gates[:, 0].float(), head_B.sigmoid())
    assert torch.autograd.grad(plan.gates.sum(), z_BN, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(plan.gates.sum(), head_B)[0].abs().min() > 0
    with pytest.raises(ValueError, match="needs reliability_logits"):
        LanguageRouter(5, "sigmoid")(None, context(z_BN))


def test_gumbel_explores_in_training_and_has_a_soft_gradient() -> None:
    router = LanguageRouter(5, "gumbel")
    z_BN = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    chosen = {
        int(expert)
        for seed in range(20)
        for expert in router(None, context(z_BN, generator=torch.Generator().manual_seed(seed))).expert_ids
    }
    assert chosen == set(range(5))
    plan = router(None, context(z_BN, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(plan.gates, torch.full_like(plan.gates, 0.2))
    again = router(None, context(z_BN, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(again.expert_ids, plan.expert_ids)
    gradient = torch.autograd.grad(plan.gates.sum(), z_BN)[0]
    plain = LanguageRouter(5, routing="true")(None, context(z_BN, languages_B=plan.expert_ids[:, 0]))
    assert not torch.allclose(gradient, torch.autograd.grad(plain.gates.sum(), z_BN)[0])
    router.eval()
    assert torch.equal(router(None, context(z_BN)).expert_ids, router(None, context(z_BN)).expert_ids)


def test_one_and_zero_leave_the_other_expert_out() -> None:
    one = LanguageRouter(5, "one")(None, context(random_logits()))
    assert one.shared_gates is None and one.gates.tolist() == [[1.0]] * 3
    zero = LanguageRouter(5, "zero")(None, context(random_logits()))
    assert zero.expert_ids.tolist() == [[5]] * 3 and zero.shared_gates.tolist() == [1.0] * 3


def test_routing_by_label_falls_back_to_the_prediction() -> None:
    z_BN = random_logits()
    predicted = z_BN.argmax(-1)
    labels_B = torch.tensor([(int(predicted[0]) + 1) % 5, -1, 2])
    plan = LanguageRouter(5, routing="true")(None, context(z_BN, languages_B=labels_B))
    assert plan.expert_ids[:, 0].tolist() == [int(labels_B[0]), int(predicted[1]), 2]
    assert plan.aux["predicted"].tolist() == predicted.tolist()
    # The reliability is the probability of the routed language, so a wrong guess leans on the agnostic expert.
    torch.testing.assert_close(plan.gates[0, 0], z_BN.softmax(-1)[0, labels_B[0]])
    by_default = LanguageRouter(5)(None, context(z_BN, languages_B=labels_B))
    assert by_default.expert_ids[:, 0].tolist() == predicted.tolist()
    forced = LanguageRouter(5)(None, context(z_BN, languages_B=labels_B, routing="true"))
    assert torch.equal(forced.expert_ids, plan.expert_ids)


def test_scheduled_routing_takes_the_label_for_a_share_of_the_utterances() -> None:
    z_BN = torch.zeros(400, 2)
    z_BN[:, 0] = 1
    rows = PackedRows.from_lengths(torch.ones(400, dtype=torch.long), 1)
    router = LanguageRouter(2, routing="scheduled")

    def share(probability: float) -> float:
        labels_B = torch.ones(400, dtype=torch.long)
        plan = router(None, RoutingContext(rows, z_BN, labels_B, probability))
        return float(plan.expert_ids.float().mean())

    assert share(1.0) == 1 and share(0.0) == 0
    assert 0.15 < share(0.25) < 0.35
    router.eval()
    assert share(1.0) == 0


def test_frame_level_routing_looks_at_valid_frames_only() -> None:
    z_BTN = torch.randn(3, 4, 5)
    padding = torch.arange(4) >= LENGTHS[:, None]
    z_BTN[padding] = torch.nan
    z_BTN.requires_grad_()
    plan = LanguageRouter(5)(None, context(z_BTN))
    assert plan.layout == "token" and plan.num_units == 8
    assert plan.expert_ids[:, 0].tolist() == z_BTN[~padding].argmax(-1).tolist()
    gradient = torch.autograd.grad(plan.gates.sum(), z_BTN)[0]
    assert torch.count_nonzero(gradient[padding]) == 0 and gradient[~padding].abs().max() > 0
    labelled = LanguageRouter(5, routing="true")(None, context(z_BTN, languages_B=torch.tensor([4, 1, 0])))
    assert labelled.expert_ids[:, 0].tolist() == [4, 4, 4, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("reliability", ["max_posterior", "entropy", "gumbel"])
@pytest.mark.parametrize("routing", ["predicted", "true"])
def test_the_gates_carry_a_gradient_to_the_logits(reliability: str, routing: str) -> None:
    z_BN = random_logits()
    router = LanguageRouter(5, reliability, routing=routing).eval()
    plan = router(None, context(z_BN, languages_B=torch.tensor([0, 1, 2])))
    assert torch.autograd.grad(plan.gates.sum(), z_BN)[0].abs().min() > 0


def test_one_language_is_always_reliable() -> None:
    for reliability in ("max_posterior", "entropy"):
        plan = LanguageRouter(1, reliability)(None, context(torch.randn(3, 1)))
        torch.testing.assert_close(plan.gates, torch.ones(3, 1))


def test_bad_language_routers_are_refused() -> None:
    for kwargs, message in (
        ({"reliability": "trust"}, "reliability must be one of"),
        ({"routing": "random"}, "routing must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            LanguageRouter(5, **kwargs)
    with pytest.raises(ValueError, match="language_logits"):
        LanguageRouter(5)(None)
    with pytest.raises(ValueError, match="for 5 languages, not 4"):
        LanguageRouter(5)(None, context(torch.randn(3, 4)))
    with pytest.raises(ValueError, match="3 utterances, not 2"):
        LanguageRouter(5)(None, context(torch.randn(2, 5)))


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
