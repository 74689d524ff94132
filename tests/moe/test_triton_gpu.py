"""What only a GPU can show of the Triton backend: real block sizes, no waiting, CUDA graphs, launches, big offsets."""

import pytest
import torch
from torch import Tensor

from mole_asr.moe import Experts, RoutingPlan, dispatch
from mole_asr.moe.experts import Activation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(
    rows: int, top_k: int, dtype: torch.dtype, activation: Activation = "silu", experts: int = 8, width: int = 256
) -> tuple[Tensor, Tensor, Tensor, Experts]:
    """Rows, ids (one in nine says "no expert"), gates, experts."""
    with torch.device("cuda"):
        stack = Experts(experts, width, 4 * width, activation).to(dtype)
        ids = torch.randint(0, experts + 1, (rows, top_k), dtype=torch.int32)
        x_ND = torch.randn(rows, width, dtype=dtype, requires_grad=True)
        return x_ND, ids, torch.randn(rows, top_k, requires_grad=True), stack


def step(x_ND: Tensor, ids: Tensor, gates: Tensor, experts: Experts, backend="triton") -> list[Tensor]:
    """Output and gradients, of a new plan."""
    plan = RoutingPlan(ids, gates, experts.num_experts)
    y_ND = dispatch(x_ND, plan, experts, backend)
    return [y_ND, *torch.autograd.grad(y_ND.float().square().sum(), [x_ND, gates, *experts.parameters()])]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_real_sizes_are_as_close_as_plain_torch(top_k: int, skewed: bool, activation: Activation) -> None:
    x_ND, ids, gates, experts = make(3000, top_k, torch.bfloat16, activation)
    if skewed:
        ids[:, 0] = 3
    ours, plain = step(x_ND, ids, gates, experts), step(x_ND, ids, gates, experts, "reference")
    exact = step(x_ND.detach().double().requires_grad_(), ids, gates, experts.double(), "reference")
    for found, other, expected in zip(ours, plain, exact, strict=True):
        assert relative(found, expected) <= 1.5 * relative(other, expected)


def test_the_same_input_gives_the_same_bits() -> None:
    case = make(3000, 2, torch.bfloat16)
    for a, b in zip(step(*case), step(*case), strict=True):
        assert torch.equal(a, b)


def test_nothing_waits_for_the_device() -> None:
    case = make(3000, 2, torch.bfloat16)
    step(*case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_is_replayed_with_other_routing() -> None:
    x_ND, ids, gates, experts = make(1000, 2, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x_ND, ids, gates, experts)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x_ND, ids, gates, experts)
    for other in (torch.randint_like(ids, 0, 9), torch.full_like(ids, 5), torch.full_like(ids, 8)):
        ids.copy_(other)
        graph.replay()
        for found, expected in zip(captured, step(x_ND, ids, gates, experts), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("top_k", "limit"), [(1, 4), (2, 5)])
def test_launches_of_a_forward_pass(top_k: int, limit: int) -> None:
    x_ND, ids, gates, experts = make(3000, top_k, torch.bfloat16)

    def forward() -> None:
        with torch.no_grad():
            dispatch(x_ND, RoutingPlan(ids, gates, 8), experts, "triton")
        torch.cuda.synchronize()

    forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        forward()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(on_device) <= limit, [event.name for event in on_device]


def test_offsets_beyond_two_to_the_31() -> None:
    rows, width = 600_000, 512
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    x_ND, ids, gates, experts = make(rows, 1, torch.bfloat16, "swiglu", experts=2, width=width)
    assert rows * 2 * experts.d_ff > 2**31
    found = step(x_ND, ids, gates, experts)
    last = slice(rows - 1000, rows)
    expected = step(x_ND[last].detach().requires_grad_(), ids[last], gates[last].detach().requires_grad_(), experts)
    for a, b in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(a[last], b, rtol=2e-2, atol=2e-2)
