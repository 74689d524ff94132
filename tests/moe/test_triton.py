"""The Triton backend against the reference: on a GPU if there is one, else in Triton's interpreter.

A program costs the interpreter milliseconds, so the cases are small and the blocks too.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mole_asr.moe import Experts, PackedRows, RoutingPlan, dispatch

ACTIVATIONS = ["relu", "silu", "gelu", "swiglu"]
Case = tuple[Tensor, RoutingPlan, Experts]


@pytest.fixture(autouse=True)
def device(triton_device: str) -> Iterator[str]:
    """Everything is made on the device of the tests, in the most exact type that it computes."""
    with torch.device(triton_device):
        torch.set_default_dtype(torch.float64 if triton_device == "cpu" else torch.float32)
        yield triton_device
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16: several tiles an expert, several blocks of columns, several steps, weights in parts."""
    from mole_asr.moe.backends.triton_problem import Blocks

    for module in ("triton_problem", "triton_weights"):
        monkeypatch.setattr(f"mole_asr.moe.backends.{module}.block_sizes", lambda *_: Blocks(16, 16, 16, 4, 2))
    monkeypatch.setattr("mole_asr.moe.backends.triton_weights.split_rows", lambda *_: 16)


def make_case(
    rows: int = 20,
    num_experts: int = 3,
    top_k: int = 2,
    d_model: int = 19,
    d_ff: int = 12,
    shared: bool = True,
    empty_slots: bool = True,
    **kwargs,
) -> Case:
    experts = Experts(num_experts, d_model, d_ff, shared=shared, **kwargs)
    ids = torch.randint(0, num_experts + empty_slots, (rows, top_k), dtype=torch.int32)
    gates = torch.randn(rows, top_k, requires_grad=True)
    plan = RoutingPlan(ids, gates, num_experts, shared_gates=torch.randn(rows, requires_grad=True) if shared else None)
    return torch.randn(rows, d_model), plan, experts


def results(case: Case, backend: str = "triton") -> list[Tensor]:
    """The output, then the gradient of a lopsided loss in everything that can have one."""
    x_ND, plan, experts = case
    x_ND = x_ND.detach().requires_grad_()
    plan.schedules.clear()
    y_ND = dispatch(x_ND, plan, experts, backend)
    weights = torch.linspace(-1, 2, y_ND.numel(), dtype=y_ND.dtype).view_as(y_ND)
    inputs = [x_ND, plan.gates, *experts.parameters()]
    inputs += [] if plan.shared_gates is None else [plan.shared_gates]
    found = torch.autograd.grad((y_ND * weights).sum(), inputs, allow_unused=True)
    return [y_ND.detach(), *(torch.zeros_like(i) if f is None else f for i, f in zip(inputs, found, strict=True))]


def assert_same(case: Case, backend: str = "reference") -> None:
    exact = torch.get_default_dtype() == torch.float64
    for found, expected in zip(results(case), results(case, backend), strict=True):
        torch.testing.assert_close(found, expected, **({} if exact else {"rtol": 1e-4, "atol": 1e-5}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("bias", "top_k", "shared"), [(True, 1, True), (False, 1, False), (True, 2, False)])
def test_equals_the_reference(activation: str, bias: bool, top_k: int, shared: bool, small_blocks: None) -> None:
    assert_same(make_case(activation=activation, bias=bias, top_k=top_k, shared=shared, d_model=12, d_ff=19))


def test_strided_rows_gates_and_weights(small_blocks: None) -> None:
    _, plan, experts = make_case()
    experts.w2_EDF = torch.nn.Parameter(torch.randn(3, 12, 19).mT)
    gates = torch.randn(2, 20).t().requires_grad_()
    assert_same((torch.randn(19, 20).t(), RoutingPlan(plan.expert_ids, gates, 3, shared_gates=gates[:, 0]), experts))


def test_only_the_first_product_has_a_bias(small_blocks: None) -> None:
    assert_same(make_case(output_bias=False))


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, bool, bool, dict]:
    return (
        draw(st.integers(0, 2**16)),
        draw(st.booleans()),
        draw(st.booleans()),
        {
            "rows": draw(st.integers(0, 30)),
            "num_experts": draw(st.integers(1, 9)),
            "top_k": draw(st.integers(1, 3)),
            "d_model": draw(st.integers(1, 20)),
            "d_ff": draw(st.integers(1, 20)),
            "activation": draw(st.sampled_from(ACTIVATIONS)),
            "bias": draw(st.booleans()),
            "shared": draw(st.booleans()),
            "empty_slots": draw(st.booleans()),
        },
    )


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_any_sizes_equal_the_reference(small_blocks: None, case: tuple[int, bool, bool, dict]) -> None:
    seed, same_expert, no_expert, sizes = case
    torch.manual_seed(seed)
    x_ND, plan, _ = made = make_case(**sizes)
    if same_expert:
        plan.expert_ids.fill_(plan.num_experts - 1)
    if no_expert:
        plan.expert_ids[: len(x_ND) // 2].fill_(plan.num_experts)
    assert_same(made)


def test_the_blocks_of_real_sizes_give_the_same() -> None:
    assert_same(make_case(rows=40, num_experts=2, d_model=10, d_ff=70, activation="swiglu"))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_float32_is_as_close_as_float32_can_be(activation: str, small_blocks: None) -> None:
    x_ND, plan, experts = make_case(activation=activation)
    exact = results((x_ND.double(), plan, experts.double()), "reference")
    single = results((x_ND.float(), plan, experts.float()))
    assert single[0].dtype == torch.float32
    for found, expected in zip(single, exact, strict=True):
        assert relative(found, expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_close_as_plain_torch(
    dtype: torch.dtype, autocast: bool, device: str, small_blocks: None
) -> None:
    x_ND, plan, experts = make_case(rows=24, d_model=32, d_ff=16, activation="swiglu")
    # What the types can hold, so that all start from the same numbers.
    x_ND, experts = x_ND.to(dtype), experts.to(dtype)
    exact = results((x_ND.double(), plan, experts.double()), "reference")
    if autocast:
        x_ND, experts = x_ND.float(), experts.float()
    else:
        x_ND, experts = x_ND.to(dtype), experts.to(dtype)
    with torch.autocast(device, dtype, enabled=autocast):
        ours, plain = results((x_ND, plan, experts)), results((x_ND, plan, experts), "reference")
    for found, other, expected in zip(ours, plain, exact, strict=True):
        assert found.dtype == other.dtype
        assert 0 < relative(found, expected) <= 1.5 * relative(other, expected)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_gradcheck(device: str) -> None:
    if device != "cpu":
        pytest.skip("a GPU has no float64 here")
    x_ND, plan, experts = make_case(rows=4, num_experts=2, d_model=4, d_ff=3, activation="swiglu", bias=False)
    names, parameters = zip(*experts.named_parameters(), strict=True)
    holder = torch.nn.Module()
    holder.experts = experts
    holder.forward = lambda x, gates, shared_gates: dispatch(
        x, RoutingPlan(plan.expert_ids, gates, 2, shared_gates=shared_gates), experts, "triton"
    )

    def run(x_ND: Tensor, gates: Tensor, shared_gates: Tensor, *values: Tensor) -> Tensor:
        named = {f"experts.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(holder, named, (x_ND, gates, shared_gates))

    inputs = (x_ND.requires_grad_(), plan.gates, plan.shared_gates, *parameters)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_slot_without_expert_is_as_if_it_were_not_there(top_k: int, small_blocks: None) -> None:
    x_ND, plan, experts = make_case(top_k=top_k, shared=False)
    plan.expert_ids[:5].fill_(3)  # rows without any expert
    plan.expert_ids[5:9, 0] = 7  # no such expert
    expected = results((x_ND, plan, experts))
    nobodys = torch.full_like(x_ND[:5], torch.nan)
    gates = torch.where(plan.expert_ids < 3, plan.gates, torch.nan).detach().requires_grad_()
    found = results((torch.cat([nobodys, x_ND[5:]]), RoutingPlan(plan.expert_ids, gates, 3), experts))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for index in (0, 1, 2):  # y, dx, dgates
        assert torch.count_nonzero(found[index][:5]) == 0


def test_an_expert_without_rows_has_a_gradient_of_exactly_zero(small_blocks: None) -> None:
    x_ND, plan, experts = make_case(rows=40, top_k=1, d_model=12)
    plan.expert_ids.fill_(1)  # more rows than one part of a weight's gradient holds
    assert_same((x_ND, plan, experts))
    dispatch(x_ND, plan, experts, "triton").sum().backward()
    for tensor in experts.stack():
        assert torch.count_nonzero(tensor.grad[1]) > 0
        assert torch.count_nonzero(tensor.grad[[0, 2]]) == 0


@pytest.mark.parametrize("rows", [0, 6])
def test_no_rows_or_no_experts_for_them(rows: int, small_blocks: None) -> None:
    x_ND, plan, experts = make_case(rows=rows, shared=False)
    plan.expert_ids.fill_(3)
    for tensor in results((x_ND, plan, experts)):
        assert torch.count_nonzero(tensor) == 0


def test_same_bits_twice_whatever_the_memory_held(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(d_ff=19, activation="swiglu")
    blocks: list[Tensor] = []

    def guarded(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*args, **kwargs) -> Tensor:
            like = make(*args, **kwargs)
            if not like.is_floating_point():
                return like
            block = torch.full((like.numel() + 128,), torch.nan, dtype=like.dtype, device=like.device)
            blocks.append(block)
            block[:64] = block[-64:] = 777
            return block[64:-64].view(like.shape)

        return new

    expected = results(case)
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", guarded(torch.empty_like))
    monkeypatch.setattr(torch, "empty", guarded(torch.empty))
    found = results(case)
    monkeypatch.undo()
    assert len(blocks) > 10
    for block in blocks:  # nothing is written beside an output
        assert (block[:64] == 777).all() and (block[-64:] == 777).all()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("frozen", "plain_rows"), [(True, False), (False, True)])
def test_gradients_that_nobody_needs(frozen: bool, plain_rows: bool, small_blocks: None) -> None:
    x_ND, plan, experts = make_case()
    expected = results((x_ND, plan, experts))
    experts.requires_grad_(not frozen)
    x_ND.requires_grad_(not plain_rows)
    dispatch(x_ND, plan, experts, "triton").mul(torch.linspace(-1, 2, x_ND.numel()).view_as(x_ND)).sum().backward()
    found = [x_ND.grad, plan.gates.grad, *(p.grad for p in experts.parameters()), plan.shared_gates.grad]
    for a, b in zip(found, expected[1:], strict=True):
        assert a is None or torch.equal(a, b)
    assert [a is None for a in found] == [plain_rows, False, *[frozen] * 8, False]


def test_a_segment_plan_is_the_plan_of_its_rows(small_blocks: None) -> None:
    x_ND, _, experts = make_case()
    segments = PackedRows.from_lengths(torch.tensor([3, 0, 13, 4]), 13).segments_B1
    ids = torch.tensor([[2, 3], [0, 1], [1, 1], [0, 2]], dtype=torch.int32)
    gates, shared_gates = torch.randn(4, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    assert_same((x_ND, RoutingPlan(ids, gates, 3, "segment", segments, shared_gates=shared_gates), experts))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("pairs_a_program", [16, 1024])
def test_the_sort_is_a_stable_sort_by_expert(
    pairs_a_program: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mole_asr.moe.backends import triton_plan

    monkeypatch.setattr(triton_plan, "_PAIRS_A_PROGRAM", pairs_a_program)
    monkeypatch.setattr(triton_plan, "_ONE_HOT_SIZE", 256)
    ids = torch.randint(-1, 7, (83, 2), dtype=torch.int32)
    offsets, pair_P, place_P = triton_plan.sort_pairs(ids, 5, shared)
    groups = torch.where((ids >= 0) & (ids < 5), ids, 5 + shared)
    if shared:
        groups = torch.cat([groups, torch.full_like(groups[:, :1], 5)], 1)
    order_P = groups.flatten().argsort(stable=True)
    assert torch.equal(pair_P.long(), order_P)
    assert torch.equal(offsets[1:].long(), torch.bincount(groups.flatten(), minlength=6 + shared).cumsum(0))
    assert offsets[0] == 0
    assert torch.equal(place_P.long(), torch.where(groups.flatten() < 5 + shared, order_P.argsort(), -1))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all kernels launched."""
    from triton.runtime import KernelInterface

    names: list[str] = []
    launch = KernelInterface.__getitem__

    def count(self, grid: object) -> Callable:
        names.append(self.__name__)
        return launch(self, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", count)
    return names


def test_layers_that_share_a_plan_sort_it_once(launches: list[str]) -> None:
    x_ND, plan, experts = make_case(rows=4)
    y_ND = dispatch(x_ND, plan, experts, "triton")
    products = ["_up_kernel", "_rows_kernel", "_sum_slots_kernel"]
    assert launches == ["_count_kernel", "_scatter_kernel", *products]
    dispatch(y_ND, plan, experts, "triton")
    assert launches[5:] == products


def test_one_expert_a_row_needs_no_sum(launches: list[str]) -> None:
    x_ND, plan, experts = make_case(rows=4, top_k=1, shared=False)
    dispatch(x_ND.requires_grad_(), plan, experts, "triton").sum().backward()
    forward = ["_count_kernel", "_scatter_kernel", "_up_kernel", "_rows_kernel"]
    assert launches == [*forward, "_hidden_kernel", "_gate_kernel", "_rows_kernel", "_weight_kernel", "_weight_kernel"]


def test_the_host_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(rows=4)

    def refuse(*_: object) -> None:
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    results(case)


def test_what_it_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mole_asr.moe.backends.triton.INTERPRETED", False)
    x_ND, plan, experts = make_case()
    with pytest.raises(ValueError, match=r"computes no torch\.float64"):
        dispatch(x_ND.double(), plan, experts.double(), "triton")
    with pytest.raises(ValueError, match="on cpu: use 'auto'"), torch.device("cpu"):
        x_ND, plan, experts = make_case()
        dispatch(x_ND, plan, experts, "triton")


@pytest.mark.parametrize(("rows", "expected"), [(0, 16), (15, 16), (31, 16), (32, 32), (5000, 128)])
def test_blocks_of_rows_are_no_higher_than_an_expert(rows: int, expected: int) -> None:
    from mole_asr.moe.backends.triton_problem import block_sizes

    assert block_sizes(rows, 2048, 512, torch.bfloat16).rows == expected
    assert block_sizes(rows, 2048, 512, torch.float32).rows == min(64, expected)
    assert all(size >= 16 for size in block_sizes(rows, 1, 1, torch.bfloat16)[:3])
