import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mole_asr.moe import LanguageRouter, MoELayer, PackedRows, RoutingContext, TopKRouter
from mole_asr.moe.losses import importance_loss, load_balance_loss, router_z_loss
from mole_asr.moe.statistics import routing_statistics

LENGTHS = torch.tensor([3, 0, 6, 1])


def padded(fill: float) -> Tensor:
    x_BTD = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3))
    x_BTD[torch.arange(6) >= LENGTHS[:, None]] = fill
    return x_BTD


def top_k_layer() -> MoELayer:
    return MoELayer(8, 16, 4, TopKRouter(8, 4, 2, shared_expert=True), shared_expert=True)


def test_padding_touches_neither_output_nor_gradient_nor_losses_nor_statistics() -> None:
    layer = top_k_layer()
    results = []
    for fill in (0.0, torch.nan):
        x_BTD = padded(fill).requires_grad_()
        y_BTD, plan = layer(x_BTD, LENGTHS)
        losses = [load_balance_loss(plan), importance_loss(plan), router_z_loss(plan)]
        total = y_BTD.square().sum() + sum(losses)
        gradients = torch.autograd.grad(total, [x_BTD, *layer.parameters()])
        statistics = routing_statistics(plan, plan.num_units)
        results.append([y_BTD, *losses, *gradients, statistics.load_E, statistics.reliability])
    for with_zeros, with_nan in zip(*results, strict=True):
        assert torch.equal(with_zeros, with_nan)
    padding = torch.arange(6) >= LENGTHS[:, None]
    assert torch.count_nonzero(results[0][0][padding]) == 0
    assert torch.count_nonzero(results[0][4][padding]) == 0


def test_a_batch_gives_what_its_utterances_give_alone() -> None:
    layer = top_k_layer().double()
    x_BTD = padded(0.0).double()
    y_BTD, _ = layer(x_BTD, LENGTHS)
    for x_TD, y_TD, length in zip(x_BTD, y_BTD, LENGTHS.tolist(), strict=True):
        alone_1TD, _ = layer(x_TD[None, :length], torch.tensor([length]))
        torch.testing.assert_close(alone_1TD[0], y_TD[:length])


def test_layers_share_one_plan_and_its_gradient() -> None:
    layers = [MoELayer(8, 16, 3, shared_expert=True) for _ in range(2)]
    x_BTD, rows = padded(0.0), PackedRows.from_lengths(LENGTHS, 6)

    def gradient(which: list[MoELayer]) -> Tensor:
        z_BN = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
        plan = LanguageRouter(3)(None, RoutingContext(rows, z_BN))
        total = sum(layer(x_BTD, rows=rows, plan=plan)[0].square().sum() for layer in which)
        return torch.autograd.grad(total, z_BN)[0]

    torch.testing.assert_close(gradient(layers), gradient(layers[:1]) + gradient(layers[1:]))
    assert gradient(layers)[[0, 2, 3]].abs().min() > 0
    assert torch.count_nonzero(gradient(layers)[1]) == 0  # an utterance without frames


@pytest.mark.parametrize("labels", [None, [2, 1, 0, 0]])
def test_recognition_gradient_of_the_reliability_is_the_difference_of_the_experts(labels: list[int] | None) -> None:
    layer = MoELayer(8, 16, 3, shared_expert=True).double()
    rows = PackedRows.from_lengths(LENGTHS, 6)
    z_BN = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    context = RoutingContext(rows, z_BN, None if labels is None else torch.tensor(labels))
    x_BTD = padded(0.0).double()

    def output(reliability: str) -> Tensor:
        plan = LanguageRouter(3, reliability)(None, context)
        return layer(x_BTD, rows=rows, plan=plan)[0]

    plan = LanguageRouter(3)(None, context)
    y_BTD, _ = layer(x_BTD, rows=rows, plan=plan)
    found = torch.autograd.grad(y_BTD.sum(), z_BN, retain_graph=True)[0]
    difference_B = (output("one") - output("zero")).sum((1, 2)).detach()
    expected = torch.autograd.grad((plan.gates[:, 0] * difference_B).sum(), z_BN)[0]
    torch.testing.assert_close(found, expected)


def test_a_language_router_inside_a_layer_serves_frame_level_logits() -> None:
    layer = MoELayer(8, 16, 3, LanguageRouter(3), shared_expert=True)
    rows = PackedRows.from_lengths(LENGTHS, 6)
    y_BTD, plan = layer(padded(torch.nan), rows=rows, context=RoutingContext(rows, torch.randn(4, 6, 3)))
    assert plan.num_units == 10 and y_BTD.isfinite().all()


def test_one_router_serves_all_layers_with_shared_weights() -> None:
    router = TopKRouter(8, 4, 2)
    layers = nn.ModuleList(MoELayer(8, 16, 4, router) for _ in range(3))
    names = [name for name, _ in layers.named_parameters()]
    assert [name for name in names if "router" in name] == ["0.router.scores.weight"]  # once, for the optimizer too

    def gradient(which: list[int]) -> Tensor:
        x_BTD, total = padded(0.0), torch.zeros(())
        for i, layer in enumerate(layers):
            y_BTD, plan = layer(x_BTD, LENGTHS)
            total = total + (i in which) * plan.gates.square().sum()
            x_BTD = (x_BTD + y_BTD).detach()
        return torch.autograd.grad(total, router.scores.weight)[0]

    torch.testing.assert_close(gradient([0, 1, 2]), gradient([0]) + gradient([1]) + gradient([2]))


def test_a_shared_router_is_saved_once_and_stays_shared(tmp_path: Path) -> None:
    def build() -> nn.ModuleList:
        router = TopKRouter(8, 4, 2)
        return nn.ModuleList(MoELayer(8, 16, 4, router) for _ in range(3))

    layers, again = build(), build()
    safetensors.torch.save_model(layers, str(tmp_path / "model.safetensors"))
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert len([name for name in saved if "router" in name]) == 1
    safetensors.torch.load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again[2].router.scores.weight, layers[0].router.scores.weight)
    assert again[0].router is again[2].router
    twice = build()  # torch's own state dict names the weights once a layer, and loads them
    twice.load_state_dict(layers.state_dict())
    assert torch.equal(twice[1].router.scores.weight, layers[0].router.scores.weight)
    assert copy.deepcopy(layers)[0].router is not layers[0].router
    assert len({id(layer.router) for layer in copy.deepcopy(layers)}) == 1


def test_one_plan_of_a_shared_router_serves_all_layers() -> None:
    router, layers = TopKRouter(8, 4, 2), [MoELayer(8, 16, 4) for _ in range(2)]
    rows = PackedRows.from_lengths(LENGTHS, 6)
    x_BTD = padded(0.0)
    plan = router(rows.pack(x_BTD))
    for layer in layers:
        y_BTD, used = layer(x_BTD, rows=rows, plan=plan)
        assert used is plan and y_BTD.isfinite().all()
    assert len(plan.schedules) == 1


def test_saved_names_last() -> None:
    assert sorted(top_k_layer().state_dict()) == [
        "experts.b1_EF",
        "experts.b2_ED",
        "experts.shared_b1_F",
        "experts.shared_b2_D",
        "experts.shared_w1_FD",
        "experts.shared_w2_DF",
        "experts.w1_EFD",
        "experts.w2_EDF",
        "router.scores.weight",
    ]


def test_experts_start_like_linear_layers() -> None:
    layer = MoELayer(100, 400, 3, activation="swiglu", shared_expert=True)
    experts = layer.experts
    for tensor, fan_in in ((experts.w1_EFD, 100), (experts.w2_EDF, 400), (experts.shared_b1_F, 100)):
        assert 0.95 / fan_in**0.5 < tensor.abs().max() <= 1 / fan_in**0.5


def test_what_is_missing_is_named() -> None:
    layer = MoELayer(8, 16, 3)
    with pytest.raises(ValueError, match="needs a plan"):
        layer(padded(0.0), LENGTHS)
    with pytest.raises(ValueError, match="lengths_B, or rows"):
        layer(padded(0.0))
    with pytest.raises(ValueError, match=r"batch of \(4, 7\), not \(4, 6\)"):
        layer(padded(0.0), rows=PackedRows.from_lengths(LENGTHS, 7))
    with pytest.raises(ValueError, match="activation must be one of"):
        MoELayer(8, 16, 3, activation="tanh")
    with pytest.raises(ValueError, match="sizes must be positive"):
        MoELayer(8, 16, 0)


def test_two_languages_that_need_opposite_maps_are_learned() -> None:
    torch.manual_seed(1)
    layer, head = MoELayer(4, 8, 2, shared_expert=True), torch.nn.Linear(4, 2)
    rows = PackedRows.from_lengths(torch.full((8,), 5), 5)
    languages_B = torch.arange(8) % 2
    x_BTD = torch.randn(8, 5, 4) + 2 * languages_B[:, None, None]
    target_BTD = torch.where(languages_B[:, None, None] == 0, x_BTD, -x_BTD)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 0.02)
    losses = []
    for _ in range(150):
        plan = LanguageRouter(2)(None, RoutingContext(rows, head(x_BTD.mean(1)), languages_B))
        loss = (layer(x_BTD, rows=rows, plan=plan)[0] - target_BTD).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
