import copy

import pytest
import torch
from torch.nn import functional

from mole_asr.moe import CentroidRouter, Experts, MLPRouter, MoELayer, OracleRouter, PseudoLabelRouter
from mole_asr.moe.experts import feed_forward
from mole_asr.moe.losses import activation_loss, pseudo_label_loss
from mole_asr.moe.pseudo_labels import activation_mass, prior_approximate_labels
from mole_asr.moe.routers import expert_centroids


def slices(activation: str = "relu", num_experts: int = 4) -> Experts:
    return Experts(num_experts, 6, 8, activation, output_bias=False).double()


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_centroids_are_the_mean_directions_of_the_neurons(activation: str) -> None:
    experts = slices(activation)
    for expert, centroid_D in enumerate(expert_centroids(experts)):
        neurons_FD = experts.w1_EFD[expert, :8]  # of swiglu, the gate's
        expected = sum(neuron / neuron.norm() for neuron in neurons_FD) / 8
        torch.testing.assert_close(centroid_D, expected.detach())


def test_the_centroid_router_takes_the_most_similar_slices() -> None:
    experts, x_ND = slices(), torch.randn(40, 6, dtype=torch.float64)
    router = CentroidRouter(expert_centroids(experts), 2)
    plan = router(x_ND)
    expected_NE = x_ND @ expert_centroids(experts).t() / x_ND.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(plan.aux["scores"], expected_NE)
    assert plan.expert_ids.tolist() == expected_NE.topk(2).indices.tolist()
    assert (plan.gates == 1).all()
    assert list(router.state_dict()) == ["centroids_ED"] and not list(router.parameters())
    assert router(torch.zeros(1, 6)).aux["scores"].tolist() == [[0.0] * 4]  # a row without a direction


def test_the_mlp_router_starts_as_the_centroid_router() -> None:
    experts, x_ND = slices(), torch.randn(40, 6, dtype=torch.float64)
    centroid, mlp = (kind(expert_centroids(experts), 2) for kind in (CentroidRouter, MLPRouter))
    torch.testing.assert_close(mlp(x_ND).aux["logits"], centroid(x_ND).aux["scores"].tanh())
    assert torch.equal(mlp(x_ND).expert_ids, centroid(x_ND).expert_ids)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_the_oracle_takes_the_slices_that_fire_most(activation: str) -> None:
    layer = MoELayer(6, 8, 4, activation=activation, slices=True).double()
    layer.router = OracleRouter(layer.experts, 2)
    x_ND = torch.randn(40, 6, dtype=torch.float64)
    plan = layer.router(x_ND)
    z_NEF = torch.einsum("nd,efd->nef", x_ND, layer.experts.w1_EFD) + layer.experts.b1_EF
    a_NEF = z_NEF.relu() if activation == "relu" else torch.nn.functional.silu(z_NEF[..., :8]) * z_NEF[..., 8:]
    torch.testing.assert_close(plan.aux["scores"], a_NEF.abs().sum(-1).detach())
    assert plan.expert_ids.tolist() == plan.aux["scores"].topk(2).indices.tolist()


def test_the_oracle_follows_its_layer_and_is_not_saved_with_it() -> None:
    layer = MoELayer(6, 8, 4, slices=True)
    names = set(layer.state_dict())
    layer.router = OracleRouter(layer.experts, 2)
    assert set(layer.state_dict()) == names
    twin = copy.deepcopy(layer).double()
    with torch.no_grad():
        twin.experts.w1_EFD.zero_()
        twin.experts.b1_EF.zero_()
    x_ND = torch.randn(3, 6, dtype=torch.float64)
    assert twin.router(x_ND).aux["scores"].sum() == 0 < layer.router(x_ND.float()).aux["scores"].sum()


def test_mass_in_bfloat16_is_summed_in_float32() -> None:
    experts = Experts(16, 8, 64, "relu").bfloat16()
    x_ND = torch.randn(50, 8).bfloat16()
    hidden = [functional.linear(x_ND, w1_FD, b1_F).relu().float() for w1_FD, b1_F, _, _ in experts.unbind()]
    torch.testing.assert_close(activation_mass(x_ND, experts), torch.stack([h.sum(-1) for h in hidden], dim=-1))


def test_prior_approximate_labels_name_the_slices_nearest_to_the_dense_output() -> None:
    experts, x_ND = slices(), torch.randn(40, 6, dtype=torch.float64)
    labels_NE = prior_approximate_labels(x_ND, experts, 2)
    outputs = [feed_forward(x_ND, weights, "relu") for weights in experts.unbind()]
    dense_ND = sum(outputs)
    errors_NE = torch.stack([(output - dense_ND / (4 / 2)).square().mean(-1) for output in outputs], -1)
    for label_E, error_E in zip(labels_NE, errors_NE, strict=True):
        assert sorted(label_E.nonzero().flatten().tolist()) == sorted(error_E.topk(2, largest=False).indices.tolist())
    assert set(labels_NE.unique().tolist()) == {0.0, 0.5} and not labels_NE.requires_grad


def test_the_pseudo_label_router_sums_slices_with_a_fixed_scale() -> None:
    router, x_ND = PseudoLabelRouter(6, 4, 2), torch.randn(40, 6)
    plan = router(x_ND)
    assert plan.gates.unique().tolist() == [2.0] and not plan.gates.requires_grad
    assert plan.expert_ids.tolist() == plan.aux["probabilities"].topk(2).indices.tolist()
    assert (PseudoLabelRouter(6, 4, 4)(x_ND).gates == 1).all()


@pytest.mark.parametrize("kind", ["mlp", "pseudo_label"])
def test_a_slice_router_learns_to_find_the_right_slices(kind: str) -> None:
    experts = slices()
    x_ND = torch.randn(400, 6, dtype=torch.float64)
    router, loss_of = PseudoLabelRouter(6, 4, 1).double(), pseudo_label_loss
    target_NE = prior_approximate_labels(x_ND, experts, 1)
    if kind == "mlp":  # started at random, not at the centroids
        router, loss_of = MLPRouter(torch.randn(4, 6, dtype=torch.float64), 1), activation_loss
        target_NE = activation_mass(x_ND, experts)
    optimizer = torch.optim.Adam(router.parameters(), 0.05)

    def hits() -> float:
        return float((router(x_ND).expert_ids[:, 0] == target_NE.argmax(-1)).double().mean())

    before = hits()
    for _ in range(100):
        loss = loss_of(router(x_ND), target_NE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    most_frequent = float(target_NE.argmax(-1).bincount().max()) / 400
    assert hits() > max(before, most_frequent) + 0.1


def test_too_many_slices_are_refused() -> None:
    experts = slices()
    for make in (
        lambda k: CentroidRouter(expert_centroids(experts), k),
        lambda k: MLPRouter(expert_centroids(experts), k),
        lambda k: OracleRouter(experts, k),
        lambda k: PseudoLabelRouter(6, 4, k),
    ):
        for k in (0, 5):
            with pytest.raises(ValueError, match=r"1\.\.4"):
                make(k)
