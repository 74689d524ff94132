"""Routers, losses and statistics wait for no device, and routers compile."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from mole_asr.moe import MoELayer, PackedRows, RoutingContext
from mole_asr.moe import losses as loss_functions
from mole_asr.moe.pseudo_labels import activation_mass, prior_approximate_labels
from mole_asr.moe.statistics import loads_by_language, routing_statistics
from tests.moe.routed import LENGTHS, ROUTERS, SEGMENTS, Batch, losses_of, make_layer


def route(name: str, layer: MoELayer, context: RoutingContext, x_ND: Tensor) -> None:
    """Router, losses and statistics."""
    assert context.languages_B is not None
    labels_U = context.languages_B if name in SEGMENTS else context.languages_B[context.rows.utterance_of_row]
    plan = layer.router(x_ND, context)
    sum(losses_of(plan).values())
    routing_statistics(plan, len(x_ND))
    loads_by_language(plan, labels_U, 8)
    if name == "mlp":
        loss_functions.activation_loss(plan, activation_mass(x_ND, layer.experts))
    if name == "pseudo_label":
        loss_functions.pseudo_label_loss(plan, prior_approximate_labels(x_ND, layer.experts, 2))


def moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> tuple[RoutingContext, Tensor]:
    """The context and the rows elsewhere; how many rows there are is known before."""
    rows = batch.context().rows
    rows = PackedRows(move(rows.lengths_B), rows.num_frames, move(rows.index_N), move(rows.segments_B1))
    return RoutingContext(rows, move(batch.logits), move(batch.languages_B)), rows.pack(move(batch.x_BTD))


@pytest.mark.parametrize("name", ROUTERS)
def test_nothing_needs_values_on_the_host(name: str) -> None:
    # Fake tensors have shapes and no values: whatever needs a value or a shape that depends on one, fails.
    layer = make_layer(name)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    context, x_ND = moved(Batch(name, layer, LENGTHS), mode.from_tensor)
    with mode:
        route(name, layer, context, x_ND)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            x_ND.nonzero()


@pytest.mark.parametrize(
    "name", ["top_k", "adaptive", "expert_choice", "family", "language_generations", "group", "forced", "oracle"]
)
def test_routers_compile_as_one_graph(name: str) -> None:
    layer = make_layer(name).train(name == "forced")
    batch = Batch(name, layer, LENGTHS)
    context = replace(batch.context(), generator=None)
    assert context.rows.utterance_of_row.shape == (sum(LENGTHS),)  # worked out outside the graph, as all packing is
    x_ND = context.rows.pack(batch.x_BTD)

    def run(x_ND: Tensor) -> tuple[Tensor, Tensor]:
        plan = layer.router(x_ND, context)
        return plan.expert_ids, plan.gates

    torch.compiler.reset()
    for found, expected in zip(torch.compile(run, fullgraph=True, backend="eager")(x_ND), run(x_ND), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROUTERS)
def test_nothing_waits_for_the_gpu(name: str) -> None:
    layer = make_layer(name).cuda()
    context, x_ND = moved(Batch(name, layer, LENGTHS), Tensor.cuda)
    route(name, layer, context, x_ND)  # the first call may wait while libraries start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        route(name, layer, context, x_ND)
    finally:
        torch.cuda.set_sync_debug_mode("default")
