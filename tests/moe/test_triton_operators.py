"""The Triton backend as operators that torch.compile and the compiler for GPUs understand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mole_asr.moe import (
    Experts,
    LanguageRouter,
    MoELayer,
    PackedRows,
    Router,
    RoutingContext,
    RoutingPlan,
    TopKRouter,
    dispatch,
)


@pytest.fixture(autouse=True)
def device(triton_device: str) -> str:
    return triton_device


def test_operators_say_truly_what_they_do(device: str) -> None:
    from mole_asr.moe.backends import triton as backend

    experts = Experts(2, 5, 6, shared=True).to(device)
    masters = [*experts.stack(), *experts.shared_weights()]
    weights = [tensor.detach().clone() for tensor in masters]
    x_ND, gates = torch.randn(4, 5, device=device), torch.randn(4, 1, device=device)
    shared_gates = torch.randn(4, device=device)
    # No row without an expert: what is kept for backward is not written there, and the check compares all of it.
    ids = torch.tensor([[0], [0], [1], [1]], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.mole.sort_pairs, (ids, 2, True))
    pairs = list(backend.sort_pairs(ids, 2, True))
    inputs = [tensor.clone().requires_grad_() for tensor in (x_ND, gates, shared_gates)]
    forward = (*inputs, masters, x_ND, weights, pairs, "silu", True)
    torch.library.opcheck(torch.ops.mole.experts_forward, forward)
    y_ND, z_PU = torch.ops.mole.experts_forward(*forward)
    assert y_ND.requires_grad and not z_PU.requires_grad
    dtypes = (torch.float32, torch.float32)
    backward = (y_ND.detach(), gates, shared_gates, x_ND, weights, pairs, z_PU, "silu", *dtypes, True, True)
    torch.library.opcheck(torch.ops.mole.experts_backward, backward)


def test_operators_of_segments_say_truly_what_they_do(device: str) -> None:
    from mole_asr.moe.backends import triton as _  # noqa: F401 - registers the operators

    unit_N, segments = (torch.tensor(values, device=device) for values in ([0, 0, 2], [0, 2, 2, 3]))
    values = torch.randn(3, 2, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.mole.rows_of_units, (values, unit_N, segments))
    torch.library.opcheck(torch.ops.mole.sum_units, (torch.randn(3, 2, device=device), segments))


def test_a_compiled_model_is_one_graph_for_any_number_of_rows(device: str) -> None:
    experts, router = Experts(2, 6, 7, "swiglu", shared=True).to(device), nn.Linear(6, 3).to(device)

    def model(x_ND: Tensor) -> Tensor:
        """Two layers with one plan."""
        scores = router(x_ND).softmax(-1)
        gates, ids = scores.topk(2, -1)
        plan = RoutingPlan(ids.int(), gates, 2, shared_gates=1 - gates[:, 0])  # id 2 is "no expert"
        return dispatch(dispatch(x_ND, plan, experts, "triton"), plan, experts, "triton")

    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    parameters = [*experts.parameters(), *router.parameters()]
    for rows in (9, 20):
        x_ND = torch.randn(rows, 6, device=device, requires_grad=True)
        found, expected = compiled(x_ND), model(x_ND)
        torch.testing.assert_close(found, expected)
        found, expected = (torch.autograd.grad(y_ND.square().sum(), [x_ND, *parameters]) for y_ND in (found, expected))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert graphs == 1


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["token", "segment"])
def test_a_compiled_layer_gives_what_it_gives_uncompiled(device: str, layout: str, autocast: bool) -> None:
    routers: dict[str, Router] = {"token": TopKRouter(6, 3, 2), "segment": LanguageRouter(3)}
    layer = MoELayer(6, 7, 3, routers[layout], shared_expert=layout == "segment", backend="triton").to(device)
    rows = PackedRows.from_lengths(torch.tensor([5, 3], device=device), 5)
    logits_BN = torch.randn(2, 3, device=device)

    def model(x_BTD: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return layer(x_BTD, rows=rows, context=RoutingContext(rows=rows, language_logits=logits_BN))[0]

    x_BTD = torch.randn(2, 5, 6, device=device, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x_BTD), model(x_BTD)
    torch.testing.assert_close(found, expected)
    inputs = [x_BTD, *layer.experts.parameters()]
    gradients = [torch.autograd.grad(y_BTD.float().square().sum(), inputs) for y_BTD in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["bfloat16 90", "float32 80"])
def test_kernels_compile_for_gpus(case: str) -> None:
    """Without a GPU nothing else tests that what the interpreter runs is also what Triton's compiler takes."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script), *case.split()], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.split())
    assert names >= {"_scatter_kernel", "_up_kernel", "_rows_kernel", "_hidden_kernel", "_weight_kernel"}
