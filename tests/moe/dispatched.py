"""Experts, plans and gradients: what the tests of dispatch share."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from mole_asr.moe import Experts, RoutingPlan, dispatch

ACTIVATIONS = ["relu", "silu", "gelu", "swiglu"]


def make_experts(num_experts: int = 3, d_model: int = 5, d_ff: int = 7, **kwargs) -> Experts:
    kwargs = {"activation": "silu", "bias": True, "shared": True, **kwargs}
    return Experts(num_experts, d_model, d_ff, **kwargs).double()


def experts_and_rows(backend: str, num_rows: int, **kwargs) -> tuple[Experts, Tensor]:
    """Three experts and rows, of a type and width that the backend computes."""
    if backend == "grouped_mm":
        return make_experts(d_model=8, d_ff=12, **kwargs).float(), torch.randn(num_rows, 8)
    return make_experts(**kwargs), torch.randn(num_rows, 5, dtype=torch.float64)


def make_plan(
    units: int,
    num_experts: int,
    top_k: int,
    segments: Tensor | None = None,
    shared: bool = True,
    sentinels: bool = True,
) -> RoutingPlan:
    ids = torch.randint(0, num_experts + sentinels, (units, top_k), dtype=torch.int32)
    gates = torch.randn(units, top_k, dtype=torch.float64, requires_grad=True)
    shared_gates = torch.randn(units, dtype=torch.float64, requires_grad=True) if shared else None
    return RoutingPlan(ids, gates, num_experts, "token" if segments is None else "segment", segments, shared_gates)


def gradients(x_ND: Tensor, plan: RoutingPlan, experts: Experts, backend) -> list[Tensor]:
    """The output, then the gradient of a lopsided loss in everything that can have one."""
    x_ND = x_ND.detach().requires_grad_()
    y_ND = dispatch(x_ND, plan, experts, backend) if isinstance(backend, str) else backend(x_ND, plan, experts)
    weights = torch.linspace(-1, 2, y_ND.numel()).bfloat16().view_as(y_ND)  # the same numbers in every type
    inputs = [x_ND, plan.gates, *experts.parameters()]
    inputs += [] if plan.shared_gates is None else [plan.shared_gates]
    loss = (y_ND * weights).sum() + 0 * sum(i.sum() for i in inputs)
    return [y_ND, *torch.autograd.grad(loss, inputs)]


def assert_same(left: list[Tensor], right: list[Tensor], **tolerance) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, dict]:
    return draw(st.integers(0, 2**16)), {
        "num_experts": draw(st.integers(1, 9)),
        "top_k": draw(st.integers(1, 3)),
        "d_model": draw(st.integers(1, 9)),
        "d_ff": draw(st.integers(1, 9)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()),
        "shared": draw(st.booleans()),
        "same_expert": draw(st.booleans()),
        "lengths": draw(st.lists(st.integers(0, 12), max_size=6)),
        "tile": draw(st.integers(1, 20)),
    }
