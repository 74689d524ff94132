"""What one dispatch layer promises, of each policy inside a whole model: limits of T, forced labels, gradients,
determinism, order of windows, and the corners (one expert, all experts, empty experts, no tokens)."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mole_asr.errors import MoleError
from mole_asr.moe.experts import feed_forward
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.losses import importance_loss, load_balance_loss, load_loss, router_z_loss
from mole_asr.text.checkpoint import LanguageModel, load_text_model, save_text_model
from mole_asr.text.model import TextModel
from mole_asr.text.policies import ExpertsConfig, routing_losses
from mole_asr.text.vocabulary import load_vocabulary

from .conftest import POLICIES, VOCAB_SIZE

Make = Callable[..., TextModel]
EXPERTS = [name for name in POLICIES if name != "dense"]
CHOICE = ExpertsConfig("expert_choice", num_experts=4)
every_policy = pytest.mark.parametrize(
    "config", [*(POLICIES[name] for name in EXPERTS), CHOICE], ids=[*EXPERTS, "expert choice"]
)


def moe_layers(model: TextModel) -> list[MoELayer]:
    return [block.feed_forward for block in model.blocks if isinstance(block.feed_forward, MoELayer)]


@pytest.mark.parametrize(("threshold", "k"), [(0.0, 1), (1.0, 2)])
def test_at_its_ends_the_gap_rule_is_top_1_and_top_2(
    make_model: Make, threshold: float, k: int, ids_BT: torch.Tensor
) -> None:
    gap = make_model(ExpertsConfig("adaptive", num_experts=4, threshold=threshold))
    fixed = make_model(ExpertsConfig("top_k", num_experts=4, top_k=k, renormalize=False))
    fixed.load_state_dict(gap.state_dict())
    found, expected = gap(ids_BT), fixed(ids_BT)
    torch.testing.assert_close(found.logits_BTV, expected.logits_BTV, rtol=1e-10, atol=1e-12)
    for layer, plan in found.plans.items():
        assert torch.equal(plan.expert_ids[:, :k], expected.plans[layer].expert_ids)
        assert ((plan.expert_ids < 4).sum(-1) == k).all()


def test_the_gap_decides_who_gets_a_second_expert(make_model: Make, ids_BT: torch.Tensor) -> None:
    model = make_model(ExpertsConfig("adaptive", num_experts=4, threshold=0.05))
    several = 0
    for plan in model(ids_BT).plans.values():
        for row, p in zip(plan.expert_ids.tolist(), plan.aux["probabilities"].tolist(), strict=True):
            first, second = sorted(range(4), key=lambda e: -p[e])[:2]
            both = p[first] - p[second] <= 0.05
            assert row == [first, second if both else 4]
            several += both
    assert 0 < several < 3 * ids_BT.numel(), "one side of the rule is not tested"


@pytest.mark.parametrize("name", ["post-moe", "families"])
def test_a_forced_label_displaces_the_lower_pick_only(make_model: Make, name: str, ids_BT: torch.Tensor) -> None:
    model, languages = make_model(POLICIES[name]), torch.tensor([0, 2, 3])
    layer = max(POLICIES[name].places(3)) if name == "families" else 1  # the first one: the same rows reach it
    free = model(ids_BT).plans[layer].expert_ids
    forced = model.train()(ids_BT, languages_B=languages).plans[layer].expert_ids
    assert torch.equal(forced[:, 0], free[:, 0])
    changed = forced[:, 1] != free[:, 1]
    assert changed.any() and not changed.all()


def model_of(make_model: Make, config: ExpertsConfig) -> TextModel:
    """A decoder, or an encoder where experts choose."""
    return make_model(config, causal=config != CHOICE)


@every_policy
def test_the_loss_reaches_router_and_chosen_experts(
    make_model: Make, config: ExpertsConfig, ids_BT: torch.Tensor
) -> None:
    """The weights carry the gradient, of one expert a token too; an expert that nobody chose has none."""
    model = model_of(make_model, config).train()
    output = model(ids_BT[:1, :2], languages_B=torch.tensor([3]))
    output.logits_BTV.square().sum().backward()
    for layer, plan in zip(moe_layers(model), output.plans.values(), strict=True):
        assert layer.router is not None
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.router.parameters())
        assert (layer.experts.shared_weights() is not None) == config.shared_expert
        assert all(part.grad.abs().sum() > 0 for part in layer.experts.shared_weights() or () if part is not None)
        chosen = set(plan.expert_ids.flatten().tolist()) - {plan.num_experts}
        reached = {e for e, gradient in enumerate(layer.experts.w1_EFD.grad) if gradient.abs().sum() > 0}
        assert reached == chosen


def test_the_balance_loss_reaches_routers_alone(make_model: Make, ids_BT: torch.Tensor) -> None:
    """Also of "adaptive": where no token has one expert, nothing pulls."""
    for threshold, pulls in ((0.0, True), (1.0, False)):
        model = make_model(ExpertsConfig("adaptive", layers=[2], num_experts=4, threshold=threshold))
        (plan,) = model(ids_BT).plans.values()
        balance = routing_losses(model.policies, {2: plan})["balance"]
        assert torch.equal(balance, load_balance_loss(plan, one_expert_only=True))
        balance.backward()
        (layer,) = moe_layers(model)
        assert layer.router is not None and layer.experts.w1_EFD.grad is None
        assert all(bool(p.grad.abs().sum() > 0) == pulls for p in layer.router.parameters())


@every_policy
def test_evaluation_is_the_same_twice_and_knows_no_order_of_windows(
    make_model: Make, config: ExpertsConfig, ids_BT: torch.Tensor
) -> None:
    model, order = model_of(make_model, config), torch.tensor([2, 0, 1])
    logits = model(ids_BT).logits_BTV
    assert torch.equal(model(ids_BT).logits_BTV, logits)
    torch.testing.assert_close(model(ids_BT[order]).logits_BTV, logits[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_chosen_few_or_nobody(make_model: Make, name: str, ids_BT: torch.Tensor) -> None:
    """Routers that send all tokens one way leave other experts empty; a batch without tokens computes nothing."""
    model = make_model(POLICIES[name]).train(name != "noisy")  # noise breaks ties
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.scores.weight.zero_()  # type: ignore[union-attr]
            layer.experts.w1_EFD[3:] = torch.nan  # of equal scores the first ones win
    output = model(ids_BT)
    assert output.logits_BTV.isfinite().all()
    loss = sum(routing_losses(model.policies, output.plans).values(), output.logits_BTV.sum())
    loss.backward()
    gradients = [layer.experts.w1_EFD.grad for layer in moe_layers(model)]
    assert all(gradient[3:].eq(0).all() and gradient[0].ne(0).any() for gradient in gradients)
    nothing = model.train()(ids_BT[:, :0], torch.zeros(3, dtype=torch.long))
    assert nothing.logits_BTV.shape == (3, 0, VOCAB_SIZE)
    assert all(loss == 0 for loss in routing_losses(model.policies, nothing.plans).values())


def test_each_layer_can_have_a_policy_of_its_own(make_model: Make, ids_BT: torch.Tensor) -> None:
    first, last = ExpertsConfig("adaptive", layers=[0], num_experts=4), ExpertsConfig("noisy_top_k", layers="last 1")
    model = make_model(first, more=[last]).train()
    assert model.policies == {0: first, 2: last}
    output = model(ids_BT)
    losses = routing_losses(model.policies, output.plans)
    expected = load_balance_loss(output.plans[0], one_expert_only=True)
    expected = expected + importance_loss(output.plans[2]) + load_loss(output.plans[2])
    torch.testing.assert_close(losses["balance"], expected)
    torch.testing.assert_close(losses["router_z"], router_z_loss(output.plans[0]) + router_z_loss(output.plans[2]))
    with pytest.raises(MoleError, match=r"layer 2 has experts already"):
        make_model(ExpertsConfig("top_k"), more=[last])


def test_layers_can_share_a_router(make_model: Make, tmp_path: Path) -> None:
    """Omni-router: one copy of it is trained and saved; another group of layers has its own."""
    pair = ExpertsConfig("top_k", layers=[0, 2], num_experts=4, share_router=True)
    model = make_model(pair, vocab_size=258, more=[ExpertsConfig("top_k", layers=[1], share_router=True)]).float()
    low, middle, high = (layer.router for layer in moe_layers(model))
    assert low is high is not middle
    save_text_model(LanguageModel(model, load_vocabulary("bytes"), 8, ["de"]), tmp_path)
    assert sum(name.endswith("router.scores.weight") for name in load_file(tmp_path / "model.safetensors")) == 2
    loaded = load_text_model(tmp_path).model
    assert loaded.policies == model.policies
    routers = [layer.router for layer in moe_layers(loaded)]
    assert routers[0] is routers[2] and torch.equal(routers[2].scores.weight, high.scores.weight)  # type: ignore


def test_experts_choose_tokens_in_an_encoder_only(make_model: Make, ids_BT: torch.Tensor) -> None:
    encoder = make_model(CHOICE, causal=False)
    for plan in encoder(ids_BT).plans.values():
        assert (plan.expert_ids < 4).sum(0).tolist() == [ceil(ids_BT.numel() * 2 / 4)] * 4
    with pytest.raises(MoleError, match=r"expert_choice a decoder would see what is to come"):
        make_model(CHOICE)


def test_experts_choose_no_padding_and_nothing_of_nothing(
    make_model: Make, ids_BT: torch.Tensor, tmp_path: Path
) -> None:
    encoder, lengths_B = make_model(CHOICE, vocab_size=258, causal=False), torch.tensor([11, 4, 7])
    output = encoder(ids_BT, lengths_B)
    for plan in output.plans.values():
        assert (plan.expert_ids < 4).sum(0).tolist() == [22 * 2 // 4] * 4
    other_BT = ids_BT.where(torch.arange(11) < lengths_B[:, None], 0)
    valid = torch.arange(11) < lengths_B[:, None]
    assert torch.equal(encoder(other_BT, lengths_B).logits_BTV[valid], output.logits_BTV[valid])
    nothing = encoder.train()(ids_BT[:, :0], torch.zeros(3, dtype=torch.long))
    assert nothing.logits_BTV.shape == (3, 0, 258)
    save_text_model(LanguageModel(encoder.float().eval(), load_vocabulary("bytes"), 8, []), tmp_path)
    loaded = load_text_model(tmp_path).model
    assert loaded.policies == encoder.policies
    assert torch.equal(loaded(ids_BT, lengths_B).logits_BTV, encoder(ids_BT, lengths_B).logits_BTV)


@pytest.mark.parametrize("policy", ["top_k", "noisy_top_k", "adaptive", "forced", "expert_choice"])
def test_a_shared_expert_adds_its_output_to_that_of_the_others(make_model: Make, policy: Any) -> None:
    config = ExpertsConfig(policy, layers=[1], num_experts=4)
    causal = policy != "expert_choice"
    plain, shared = make_model(config, causal=causal), make_model(replace(config, shared_expert=True), causal=causal)
    shared.load_state_dict(plain.state_dict(), strict=False)
    ((one,), (both,)) = moe_layers(plain), moe_layers(shared)
    x_BTD, lengths = torch.randn(2, 5, 16, dtype=torch.float64), torch.tensor([5, 4])
    weights = both.experts.shared_weights()
    assert weights is not None
    added_BTD = feed_forward(x_BTD, weights, "swiglu")
    added_BTD[1, 4] = 0
    torch.testing.assert_close(both(x_BTD, lengths)[0], one(x_BTD, lengths)[0] + added_BTD, rtol=1e-9, atol=1e-12)


def test_noise_is_for_training(make_model: Make, ids_BT: torch.Tensor) -> None:
    model = make_model(POLICIES["noisy"])
    assert torch.equal(model(ids_BT).logits_BTV, model(ids_BT).logits_BTV)
    first, second = model.train()(ids_BT), model(ids_BT)
    assert (first.logits_BTV - second.logits_BTV).abs().max() > 1e-4
    assert all("noise_std" in plan.aux for plan in first.plans.values())


@pytest.mark.parametrize("policy", ["top_k", "adaptive"])
def test_one_expert_alone_is_a_dense_part(make_model: Make, policy: str, ids_BT: torch.Tensor) -> None:
    dense = make_model()
    one = make_model(ExpertsConfig(policy, num_experts=1, top_k=1))  # type: ignore[arg-type]
    one.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        for layer, block in zip(moe_layers(one), dense.blocks, strict=True):
            layer.experts.w1_EFD[0], layer.experts.w2_EDF[0] = (
                block.feed_forward.up.weight,
                block.feed_forward.down.weight,
            )
    torch.testing.assert_close(one(ids_BT).logits_BTV, dense(ids_BT).logits_BTV, rtol=1e-9, atol=1e-12)


def test_all_experts_together_are_their_weighted_sum(make_model: Make, ids_BT: torch.Tensor) -> None:
    """k = E: every expert computes every token; the layer against the plain sum."""
    model = make_model(ExpertsConfig("top_k", layers=[0], num_experts=4, top_k=4))
    (layer,) = moe_layers(model)
    x_BTD = torch.randn(2, 5, 16, dtype=torch.float64)
    y_BTD, plan = layer(x_BTD, torch.tensor([5, 5]))
    shares = (x_BTD @ layer.router.scores.weight.T).softmax(-1)  # type: ignore[union-attr]
    expected = torch.zeros_like(x_BTD)
    for e, (up, down) in enumerate(zip(layer.experts.w1_EFD, layer.experts.w2_EDF, strict=True)):
        gate, value = (x_BTD @ up.T).chunk(2, dim=-1)
        expected += shares[..., e, None] * ((torch.nn.functional.silu(gate) * value) @ down.T)
    torch.testing.assert_close(y_BTD, expected, rtol=1e-6, atol=1e-6)
    assert plan.top_k == 4 and model(ids_BT).logits_BTV.isfinite().all()
