"""Splits of neurons, layers that remember theirs, routers fitted to them, and the gated activations."""

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.moe import Experts, MLPRouter, RoutingPlan, dispatch
from mole_asr.moe.convert import SliceConfig, SlicedFeedForward, SlicedLayer, make_groups
from mole_asr.moe.convert.fitting import fit_mlp_router, mass_kept
from mole_asr.moe.convert.sliced import describe, rebuild, sliced_layers
from mole_asr.moe.convert.splits import balanced_assignment, balanced_partition, coactivation_graph
from mole_asr.moe.experts import ExpertWeights, activate, feed_forward
from mole_asr.moe.losses import activation_loss
from mole_asr.moe.pseudo_labels import activation_mass, prior_approximate_labels
from mole_asr.moe.routers import expert_centroids
from tests.moe.routed import dense_ffn

SPLITS = ["contiguous", "random", "clusters", "coactivation"]
KINDS = ["centroid", "mlp", "oracle", "linear", "prior_oracle"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- gated activations


def test_gated_activations_are_what_they_say() -> None:
    z_NF = torch.randn(9, 8, dtype=torch.float64)
    gate, value = z_NF[:, :4], z_NF[:, 4:]
    by_tanh = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(activate(z_NF, "reglu"), gate.clamp(min=0) * value)
    torch.testing.assert_close(activate(z_NF, "geglu"), by_tanh * value)
    torch.testing.assert_close(activate(z_NF, "swiglu"), gate / (1 + (-gate).exp()) * value)


@pytest.mark.parametrize("activation", ["reglu", "geglu"])
def test_tiles_give_gated_experts_the_gradients_of_the_reference(activation: str) -> None:
    experts = Experts(3, 5, 7, activation, shared=True).double()
    ids = torch.randint(0, 4, (20, 2), dtype=torch.int32)
    found = []
    for backend in ("reference", "cpu_tiled"):
        x_ND = torch.linspace(-1, 1, 100, dtype=torch.float64).view(20, 5).requires_grad_()
        gates, shared = torch.ones(20, 2).double().requires_grad_(), torch.ones(20).double().requires_grad_()
        plan = RoutingPlan(ids, gates, 3, shared_gates=shared)
        loss = dispatch(x_ND, plan, experts, backend).square().sum()
        found.append(torch.autograd.grad(loss, [x_ND, gates, shared, *experts.parameters()]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_triton_backend_refuses_what_its_kernels_do_not_know() -> None:
    plan = RoutingPlan(torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1), 1)
    with pytest.raises(ValueError, match=r"triton.*'reglu'"):
        dispatch(torch.randn(4, 5), plan, Experts(1, 5, 7, "reglu"), "triton")


# --- splits


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_every_split_holds_every_neuron_once_and_is_repeatable(split: str, activation: str) -> None:
    dense = dense_ffn(activation)
    a_NH = torch.randn(50, 24)
    groups_EF = make_groups(split, dense, 4, a_NH, seed=3)
    assert groups_EF.shape == (4, 6) and sorted(groups_EF.flatten().tolist()) == list(range(24))
    assert torch.equal(groups_EF, make_groups(split, dense, 4, a_NH, seed=3))
    assert make_groups(split, dense, 1, a_NH).tolist() == [list(range(24))]
    with pytest.raises(ValueError, match="24 neurons cannot be cut into 5"):
        make_groups(split, dense, 5, a_NH)


def test_balanced_assignment_finds_the_cheapest_one() -> None:
    worse = 0
    for _ in range(30):
        cost_HE = torch.rand(6, 3)
        labels_H = balanced_assignment(cost_HE)
        assert labels_H.bincount(minlength=3).tolist() == [2, 2, 2]
        every = [
            cost_HE[torch.tensor(order), torch.tensor([0, 0, 1, 1, 2, 2])].sum() for order in permutations(range(6))
        ]
        found = cost_HE[torch.arange(6), labels_H].sum()
        for i, j in combinations(range(6), 2):  # no swap helps
            swapped = labels_H.clone()
            swapped[[i, j]] = labels_H[[j, i]]
            assert cost_HE[torch.arange(6), swapped].sum() > found - 1e-6
        worse += float(found) > float(min(every)) + 1e-6
    assert worse <= 6  # a cycle of three points may be left


def test_clusters_of_the_weights_are_found() -> None:
    # Four directions, six noisy neurons each, shuffled.
    directions_4D, order = torch.eye(8)[:4], torch.randperm(24)
    rows_FD = (directions_4D.repeat_interleave(6, 0) + 0.1 * torch.randn(24, 8))[order] * (1 + torch.rand(24, 1))
    dense = ExpertWeights(rows_FD, None, torch.randn(8, 24), None)
    for group in make_groups("clusters", dense, 4, seed=1):
        assert len({int(order[neuron]) // 6 for neuron in group}) == 1


def test_neurons_that_fire_together_come_together() -> None:
    order = torch.randperm(24)
    topic_N = torch.randint(4, (400,))
    loud_N24 = (topic_N[:, None] == torch.arange(4).repeat_interleave(6)).float()
    a_NH = (loud_N24 * torch.rand(400, 24) + 0.05 * torch.rand(400, 24))[:, order]
    for group in make_groups("coactivation", dense_ffn(), 4, a_NH, seed=1):
        assert len({int(order[neuron]) // 6 for neuron in group}) == 1


def test_a_partition_keeps_more_weight_inside_than_chance_and_no_swap_helps() -> None:
    graph_HH = coactivation_graph(torch.randn(60, 12).relu())
    torch.testing.assert_close(graph_HH, graph_HH.t())
    assert graph_HH.diagonal().abs().sum() == 0

    def inside(groups_EF: Tensor) -> float:
        return float(sum(graph_HH[group][:, group].sum() for group in groups_EF))

    found_EF = balanced_partition(graph_HH, 3, torch.Generator().manual_seed(0))
    assert inside(found_EF) > max(inside(torch.randperm(12).view(3, 4)) for _ in range(20)) - 1e-3
    for a, b in combinations(range(3), 2):
        for i in range(4):
            for j in range(4):
                swapped = found_EF.clone()
                swapped[a, i], swapped[b, j] = found_EF[b, j], found_EF[a, i]
                assert inside(swapped) <= inside(found_EF) + 1e-2


# --- layers that remember how they were cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu", "reglu", "geglu"])
def test_a_sliced_layer_is_the_dense_one_and_gives_it_back(activation: str, kind: str) -> None:
    dense = dense_ffn(activation)
    layer = SlicedLayer.from_dense(dense, torch.randperm(24).view(4, 6), activation, kind, active=4)
    x_BTD = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = feed_forward(x_BTD, dense, activation)
    torch.testing.assert_close(SlicedFeedForward(layer)(x_BTD), expected, atol=1e-9, rtol=0)
    layer.choose_router(kind, 2)
    found, _ = layer(x_BTD.flatten(0, 1)[None], torch.tensor([18]), plan=layer.all_slices(18))
    torch.testing.assert_close(found.view_as(x_BTD), expected, atol=1e-9, rtol=0)
    for mine, theirs in zip(layer.merged(), dense, strict=True):
        assert torch.equal(mine, theirs)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = torch.nn.Sequential(torch.nn.LayerNorm(6), torch.nn.Linear(6, 24), torch.nn.Linear(24, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_described_is_built_again(kind: str) -> None:
    model, again = Model(), Model()
    assert describe(model) == {}
    weights = ExpertWeights(*(p.detach() for p in list(model.part.parameters())[2:]))
    layer = SlicedLayer.from_dense(weights, torch.randperm(24).view(4, 6), "silu", kind, active=2)
    model.part = SlicedFeedForward.around(model.part, layer)
    assert list(sliced_layers(model)) == ["part"]
    rebuild(again, describe(model))
    again.load_state_dict(model.state_dict())
    x_ND = torch.randn(5, 6)
    assert torch.equal(again.part(x_ND), model.part(x_ND))
    assert torch.equal(again.part.layer.groups_EF, layer.groups_EF) and again.part.norm is not None
    with pytest.raises(ValueError, match="router must be one of"):
        SliceConfig(6, 24, 4, 2, "silu", True, "none")  # type: ignore[arg-type]


# --- routers


def sparse_ffn() -> tuple[SlicedLayer, Tensor, Tensor]:
    """A ReLU FFN whose neurons come in four directions, its slices, and rows to train and to test on."""
    centres_4D = 2 * functional.normalize(torch.randn(4, 16), dim=-1)
    w1_FD = centres_4D.repeat_interleave(8, 0) + 0.3 * torch.randn(32, 16)
    dense = ExpertWeights(w1_FD, -torch.ones(32), torch.randn(16, 32), torch.zeros(16))
    rows_ND = centres_4D[torch.randint(4, (1200,))] + torch.randn(1200, 16)
    layer = SlicedLayer.from_dense(dense, make_groups("clusters", dense, 4), "relu", "mlp", active=1)
    return layer, rows_ND[:1000], rows_ND[1000:]


def test_the_learned_router_lies_between_the_centroids_and_the_oracle() -> None:
    layer, train_ND, test_ND = sparse_ffn()
    assert isinstance(layer.router, MLPRouter)
    before = activation_mass(train_ND, layer.experts)
    loss = fit_mlp_router(layer.router, train_ND, before, epochs=8)
    learned = mass_kept(layer, test_ND)
    found = {}
    for kind in ("centroid", "oracle", "linear"):
        layer.choose_router(kind, 1)
        found[kind] = mass_kept(layer, test_ND)
    assert found["linear"] < found["centroid"] <= learned + 0.02 and learned <= found["oracle"] + 1e-6
    assert 0 < loss < 0.69
    layer.choose_router("oracle", 4)
    assert mass_kept(layer, test_ND) == pytest.approx(1)


def test_the_best_epoch_is_kept_and_too_few_rows_are_refused() -> None:
    layer, train_ND, _ = sparse_ffn()
    mass_NE, seen = activation_mass(train_ND, layer.experts), []
    router = MLPRouter(expert_centroids(layer.experts), 1)
    router.register_forward_hook(lambda _, inputs, plan: seen.append((inputs[0], plan.aux["logits"].detach())))
    best = fit_mlp_router(router, train_ND, mass_NE, epochs=5, lr=1.0)  # so high that it gets worse again
    held_out_ND = seen[-1][0]
    assert len(held_out_ND) == 100
    places_N = torch.tensor([int((train_ND == row_D).all(-1).nonzero()[0]) for row_D in held_out_ND])
    last = RoutingPlan(torch.zeros(100, 1, dtype=torch.int32), torch.ones(100, 1), 4, aux={"logits": seen[-1][1]})
    assert float(activation_loss(last, mass_NE[places_N])) > best + 1e-3
    assert float(activation_loss(router(held_out_ND), mass_NE[places_N]).detach()) == pytest.approx(best)
    with pytest.raises(ValueError, match="not 1 rows"):
        fit_mlp_router(MLPRouter(expert_centroids(layer.experts), 1), train_ND[:1], mass_NE[:1])


def test_the_prior_oracle_takes_what_its_labels_name() -> None:
    layer = SlicedLayer.from_dense(dense_ffn("silu"), torch.randperm(24).view(4, 6), "silu", "prior_oracle", active=2)
    x_ND = torch.randn(40, 6, dtype=torch.float64)
    plan = layer.router(x_ND)
    labels_NE = prior_approximate_labels(x_ND, layer.experts, 2)
    assert torch.equal(plan.expert_ids.sort(-1).values, labels_NE.topk(2).indices.sort(-1).values)
    assert (plan.gates == 2).all() and plan.gates.shape == (40, 2)


def test_labels_may_look_at_another_dense_output() -> None:
    dense = dense_ffn("silu", bias=False)
    layer = SlicedLayer.from_dense(dense, torch.randperm(24).view(4, 6), "silu", "prior_oracle", active=1)
    x_ND = torch.randn(40, 6, dtype=torch.float64)
    dense_ND = feed_forward(x_ND, dense, "silu")
    own_NE = prior_approximate_labels(x_ND, layer.experts, 1)
    assert torch.equal(prior_approximate_labels(x_ND, layer.experts, 1, dense_ND), own_NE)
    of_zero_NE = prior_approximate_labels(x_ND, layer.experts, 1, torch.zeros_like(dense_ND))
    outputs = torch.stack([feed_forward(x_ND, weights, "silu") for weights in layer.experts.unbind()])
    assert torch.equal(of_zero_NE.argmax(-1), outputs.square().sum(-1).argmin(0))
    assert not torch.equal(of_zero_NE, own_NE)
