"""No backend reads memory that it has not written: here all memory that torch hands out holds NaN."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mole_asr.moe import Experts, RoutingPlan, dispatch

N, E, D, F = 20, 4, 8, 12


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills what is not initialised
    assert torch.empty(2).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def values_and_gradients(plan: RoutingPlan, experts: Experts, x_ND: Tensor, backend: str) -> list[Tensor]:
    y_ND = dispatch(x_ND, plan, experts, backend)
    inputs = [x_ND, plan.gates, plan.shared_gates, *experts.parameters()]
    return [y_ND, *torch.autograd.grad(y_ND.square().sum(), inputs)]


@pytest.mark.parametrize("ids", ["none", "few", "all"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("backend", "layout"),
    [("cpu_tiled", "token"), ("cpu_tiled", "segment"), ("segment", "segment"), ("grouped_mm", "token")],
)
def test_what_is_not_written_is_not_read(backend: str, layout: str, bias: bool, ids: str) -> None:
    segments = torch.tensor([0, 3, 3, 9, N]) if layout == "segment" else None
    units = N if segments is None else 4
    # Slots without an expert, experts without rows (0 always), rows without an expert.
    expert_ids = torch.full((units, 2), E, dtype=torch.int32)
    if ids != "none":
        expert_ids.random_(1, E + (ids == "few"))
    gates, shared_gates = torch.randn(units, 2, requires_grad=True), torch.randn(units, requires_grad=True)
    plan = RoutingPlan(expert_ids, gates, E, layout, segments, shared_gates)
    experts, x_ND = Experts(E, D, F, "swiglu", bias, shared=True), torch.randn(N, D, requires_grad=True)
    expected = values_and_gradients(plan, experts, x_ND, "reference")
    for mine, their in zip(values_and_gradients(plan, experts, x_ND, backend), expected, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)
