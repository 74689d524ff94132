import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mole_asr.moe import ForcedLabelRouter, LanguageGroupRouter, LanguageRouter, PackedRows, RoutingContext

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


def test_gumbel_draws_among_the_languages_that_are_kept() -> None:
    router = LanguageRouter(4, "gumbel", kept=[0, 1, 3])
    logits = torch.tensor([[0.0, 5.0, 50.0, 0.0]]).expand(3, -1)  # the dropped language is far ahead
    plan = router.train()(None, context(logits))
    assert plan.expert_ids[:, 0].tolist() == [1, 1, 1] == plan.aux["predicted"].tolist()


def test_a_context_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="languages_B must hold 3 labels"):
        context(random_logits(), languages_B=torch.tensor([1]))


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
    plain = LanguageRouter(5)(None, context(z_BN, languages_B=plan.expert_ids[:, 0]))
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
    plan = LanguageRouter(5)(None, context(z_BN, languages_B=labels_B))
    assert plan.expert_ids[:, 0].tolist() == [int(labels_B[0]), int(predicted[1]), 2]
    assert plan.aux["predicted"].tolist() == predicted.tolist()
    # The reliability is the probability of the routed language, so a wrong guess leans on the agnostic expert.
    torch.testing.assert_close(plan.gates[0, 0], z_BN.softmax(-1)[0, labels_B[0]])
    unlabelled = LanguageRouter(5)(None, context(z_BN))
    assert unlabelled.expert_ids[:, 0].tolist() == predicted.tolist()


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
    labelled = LanguageRouter(5)(None, context(z_BTN, languages_B=torch.tensor([4, 1, 0])))
    assert labelled.expert_ids[:, 0].tolist() == [4, 4, 4, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("reliability", ["max_posterior", "entropy", "gumbel"])
@pytest.mark.parametrize("labels", [[-1, -1, -1], [0, 1, 2]])
def test_the_gates_carry_a_gradient_to_the_logits(reliability: str, labels: list[int]) -> None:
    z_BN = random_logits()
    router = LanguageRouter(5, reliability).eval()
    plan = router(None, context(z_BN, languages_B=torch.tensor(labels)))
    assert torch.autograd.grad(plan.gates.sum(), z_BN)[0].abs().min() > 0


def test_one_language_is_always_reliable() -> None:
    for reliability in ("max_posterior", "entropy"):
        plan = LanguageRouter(1, reliability)(None, context(torch.randn(3, 1)))
        torch.testing.assert_close(plan.gates, torch.ones(3, 1))


def test_bad_language_routers_are_refused() -> None:
    for kwargs, message in (
        ({"reliability": "trust"}, "reliability must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            LanguageRouter(5, **kwargs)
    with pytest.raises(ValueError, match="each of 5 languages, not 2"):
        LanguageRouter(5, families=[0, 1])
    with pytest.raises(ValueError, match="without a gap"):
        LanguageRouter(3, families=[0, 2, 2])
    with pytest.raises(ValueError, match="language_logits"):
        LanguageRouter(5)(None)
    with pytest.raises(ValueError, match="for 5 languages, not 4"):
        LanguageRouter(5)(None, context(torch.randn(3, 4)))
    with pytest.raises(ValueError, match="3 utterances, not 2"):
        LanguageRouter(5)(None, context(torch.randn(2, 5)))


def test_a_saturated_posterior_has_a_finite_gradient_of_its_entropy() -> None:
    z_BN = torch.tensor([[500.0, 0, 0, 0, 0], [1.0, 1, 1, 1, 1], [1.0, 1, -500, -500, -500]], requires_grad=True)
    plan = LanguageRouter(5, "entropy")(None, context(z_BN))
    assert torch.autograd.grad(plan.gates.square().sum(), z_BN)[0].isfinite().all()


FAMILIES = [1, 0, 1, 1, 0]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_posterior_of_a_family_is_the_sum_of_its_languages(temperature: float) -> None:
    z_BN = random_logits()
    plan = LanguageRouter(5, temperature=temperature, families=FAMILIES)(None, context(z_BN))
    p_BN = (z_BN / temperature).softmax(-1)
    expected = torch.stack([p_BN[:, [1, 4]].sum(-1), p_BN[:, [0, 2, 3]].sum(-1)], -1)
    assert plan.num_experts == 2 and plan.layout == "segment"
    torch.testing.assert_close(plan.aux["probabilities"], expected)
    torch.testing.assert_close(plan.gates[:, 0], expected.amax(-1))
    assert plan.expert_ids[:, 0].tolist() == expected.argmax(-1).tolist() == plan.aux["predicted"].tolist()
    assert torch.autograd.grad(plan.gates.sum(), z_BN)[0].abs().min() > 0


def test_a_family_may_win_without_having_the_likeliest_language() -> None:
    z_BN = torch.tensor([[2.4, 3.0, 2.5, -9, -9]] * 3)
    assert LanguageRouter(5, families=[0, 1, 0, 1, 1])(None, context(z_BN)).expert_ids[:, 0].tolist() == [0, 0, 0]
    assert LanguageRouter(5)(None, context(z_BN)).expert_ids[:, 0].tolist() == [1, 1, 1]


def test_families_turn_true_languages_into_experts() -> None:
    z_BN = random_logits()
    router = LanguageRouter(5, families=FAMILIES)
    plan = router(None, context(z_BN, languages_B=torch.tensor([4, -1, 2])))
    assert plan.expert_ids[:, 0].tolist() == [0, int(plan.aux["predicted"][1]), 1]
    for reliability in ("entropy", "one", "zero"):
        other = LanguageRouter(5, reliability, families=FAMILIES)(None, context(z_BN))
        assert other.num_experts == 2 and other.gates.min() >= 0 and other.gates.max() <= 1
    assert router.state_dict() == {}  # the map is configuration: names of saved models do not depend on it


def test_a_language_group_takes_the_best_of_its_own_experts() -> None:
    router = LanguageGroupRouter(6, 5, 3, k=2)
    z_BN, x_ND = random_logits(), torch.randn(8, 6)
    plan = router(x_ND, context(z_BN))
    scores_NE = x_ND @ router.scores.weight.t()
    group_N = z_BN.argmax(-1)[[0, 0, 0, 1, 2, 2, 2, 2]]
    assert plan.layout == "token" and plan.num_experts == 15
    for n, group in enumerate(group_N.tolist()):
        own = scores_NE[n, 3 * group : 3 * group + 3]
        best = own.topk(2)
        assert plan.expert_ids[n].tolist() == (best.indices + 3 * group).tolist()
        torch.testing.assert_close(plan.gates[n], best.values.softmax(-1))
        p_E = torch.zeros(15)
        p_E[3 * group : 3 * group + 3] = own.softmax(-1)
        torch.testing.assert_close(plan.aux["probabilities"][n], p_E)
    raw = LanguageGroupRouter(6, 5, 3, k=2, renormalize=False)
    raw.load_state_dict(router.state_dict())
    torch.testing.assert_close(
        raw(x_ND, context(z_BN)).gates, plan.aux["probabilities"].gather(1, plan.expert_ids.long())
    )


def test_the_group_can_be_that_of_the_true_language_or_of_a_frame() -> None:
    x_ND = torch.randn(8, 6)
    router = LanguageGroupRouter(6, 5, 3, k=1)
    labelled = router(x_ND, context(random_logits(), languages_B=torch.tensor([4, 0, 2])))
    assert (labelled.expert_ids[:, 0] // 3).tolist() == [4, 4, 4, 0, 2, 2, 2, 2]
    z_BTN = torch.randn(3, 4, 5)
    by_frame = LanguageGroupRouter(6, 5, 3, k=1)(x_ND, context(z_BTN))
    rows = PackedRows.from_lengths(LENGTHS, 4)
    assert (by_frame.expert_ids[:, 0] // 3).tolist() == rows.pack(z_BTN).argmax(-1).tolist()
    assert by_frame.aux["predicted"].shape == (8,)
    with pytest.raises(ValueError, match=r"1\.\.3"):
        LanguageGroupRouter(6, 5, 3, k=4)
    with pytest.raises(ValueError, match="LanguageGroupRouter needs a context with language_logits"):
        router(x_ND)


@pytest.mark.parametrize("k", [2, 3])
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.lists(st.integers(-1, 4), min_size=3, max_size=3))
def test_the_forced_label_is_chosen_and_displaces_only_the_lowest_pick(k: int, seed: int, labels: list[int]) -> None:
    torch.manual_seed(seed)
    router, x_ND = ForcedLabelRouter(6, 5, k, renormalize=False), torch.randn(8, 6)
    scores_NE = x_ND @ router.scores.weight.t()
    plan = router(x_ND, RoutingContext(PackedRows.from_lengths(LENGTHS, 4), languages_B=torch.tensor(labels)))
    for n, label in enumerate([labels[0]] * 3 + [labels[1]] + [labels[2]] * 4):
        best = scores_NE[n].topk(k).indices.tolist()
        expected = best if label < 0 or label in best else [*best[:-1], label]
        assert plan.expert_ids[n].tolist() == expected
        torch.testing.assert_close(plan.gates[n], scores_NE[n].softmax(-1)[expected])


def test_the_label_is_forced_in_training_alone_and_may_be_a_family() -> None:
    rows, x_ND = PackedRows.from_lengths(LENGTHS, 4), torch.randn(8, 6)
    router = ForcedLabelRouter(6, 4, families=[3, 3, 2, 1, 0])
    forced = router(x_ND, RoutingContext(rows, languages_B=torch.tensor([1, 4, -1])))
    assert all(3 in ids for ids in forced.expert_ids[:3].tolist()) and 0 in forced.expert_ids[3].tolist()
    torch.testing.assert_close(forced.gates.sum(-1), torch.ones(8))
    plain = router(x_ND)
    assert torch.equal(forced.expert_ids[4:], plain.expert_ids[4:])
    assert torch.equal(
        router.eval()(x_ND, RoutingContext(rows, languages_B=torch.zeros(3))).expert_ids, plain.expert_ids
    )
    with pytest.raises(ValueError, match="at least 2"):
        ForcedLabelRouter(6, 4, 1)
    with pytest.raises(ValueError, match="4 families need as many experts, not 5"):
        ForcedLabelRouter(6, 5, families=[3, 3, 2, 1, 0])
    assert (
        ForcedLabelRouter(6, 1, 1)(x_ND, RoutingContext(rows, languages_B=torch.zeros(3))).gates.tolist() == [[1.0]] * 8
    )
