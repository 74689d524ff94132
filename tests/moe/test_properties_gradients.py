"""Where gradients of the output and of the losses reach a router, and where they must not."""

import pytest
import torch

from mole_asr.moe import losses as loss_functions
from mole_asr.moe.pseudo_labels import activation_mass, prior_approximate_labels
from tests.moe.routed import LENGTHS, REACHES, ROUTERS, Batch, D, backends, losses_of, make_layer


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_output_has_a_gradient_to_the_router_exactly_where_it_should(name: str, training: bool) -> None:
    layer = make_layer(name).train(training)
    batch = Batch(name, layer, LENGTHS)
    for backend in ["reference", *backends(name)]:
        found = batch.gradients(layer, backend)
        if name == "noisy" and not training:  # no noise in evaluation
            assert torch.count_nonzero(found.pop("router.noise.weight")) == 0
        router = [gradient for key, gradient in found.items() if key.startswith("router.")]
        reaches = (bool(router) and all(g.abs().sum() > 0 for g in router), found["language_logits"].abs().sum() > 0)
        assert reaches == REACHES[name]
        assert REACHES[name][0] or not any(torch.count_nonzero(g) for g in router)


# What reaches the router's parameters (for language routers the language logits) of the losses, beside the output.
USUAL = {"importance", "balance", "z"}
REACHED_BY = {
    **{name: USUAL for name in ROUTERS},
    "top_k_raw": USUAL | {"load"},
    "noisy": USUAL | {"load"},
    "expert_choice": USUAL - {"balance"},  # balanced by construction
    "mlp": {"z"},
    "pseudo_label": {"balance", "z"},
    "centroid": set(),
    "oracle": set(),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_losses_reach_the_router_where_they_should(name: str) -> None:
    layer = make_layer(name, 6)
    batch = Batch(name, layer, LENGTHS)
    batch.logits.requires_grad_()
    _, plan = batch.run(layer)
    inputs = [batch.logits] if name.startswith(("language", "family")) else list(layer.router.parameters())
    reached = set()
    for loss, value in losses_of(plan).items():
        found = [None]
        if value.requires_grad:
            found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        if any(gradient is not None and gradient.abs().max() > 1e-9 for gradient in found):
            reached.add(loss)
    assert reached - {"balance_alone"} == REACHED_BY[name]


def test_slice_routers_learn_from_their_pseudo_labels() -> None:
    for name in ("mlp", "pseudo_label"):
        layer = make_layer(name)
        x_ND = torch.randn(50, D, dtype=torch.float64)
        plan = layer.router(x_ND)
        if name == "mlp":
            loss = loss_functions.activation_loss(plan, activation_mass(x_ND, layer.experts))
        else:
            loss = loss_functions.pseudo_label_loss(plan, prior_approximate_labels(x_ND, layer.experts, 2))
        gradients = torch.autograd.grad(
            loss, [*layer.router.parameters(), *layer.experts.parameters()], allow_unused=True
        )
        own = len(list(layer.router.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients[:own])
        assert all(gradient is None for gradient in gradients[own:])
