"""All backends in float32 and bfloat16, against the reference in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mole_asr.moe import Experts, PackedRows, RoutingPlan, dispatch
from mole_asr.moe.backends import products
from mole_asr.moe.experts import activate
from tests.moe.dispatched import ACTIVATIONS, cases, gradients, make_experts, make_plan

# Of an output and of a gradient: error / size of the reference, both as norms.
BOUNDS = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (1e-2, 2e-2)}


def in_double(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> list[Tensor]:
    """What the reference gives for the same numbers in float64."""

    def leaf(gates: Tensor | None) -> Tensor | None:
        return None if gates is None else gates.detach().double().requires_grad_()

    same = RoutingPlan(
        plan.expert_ids, leaf(plan.gates), plan.num_experts, plan.layout, plan.segments, leaf(plan.shared_gates)
    )
    return gradients(x_ND.double(), same, copy.deepcopy(experts).double(), "reference")


def assert_close_to_double(x_ND: Tensor, plan: RoutingPlan, experts: Experts, backend: str) -> None:
    """Output and gradients of rows in float32 or bfloat16, against the reference in float64."""
    found = gradients(x_ND, plan, experts, backend)
    for index, (mine, their) in enumerate(zip(found, in_double(x_ND, plan, experts), strict=True)):
        bound = BOUNDS[x_ND.dtype][index > 0]
        assert (mine - their).norm() <= bound * (their.norm() + their.numel() ** 0.5), (backend, index)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(list(BOUNDS)))
def test_backends_in_float32_and_bfloat16(case: tuple[int, dict], dtype: torch.dtype) -> None:
    seed, c = case
    torch.manual_seed(seed)
    d_model, d_ff = 8 * c["d_model"], 8 * c["d_ff"]  # what grouped_mm can compute
    kwargs = {name: c[name] for name in ("activation", "bias", "shared")}
    experts = Experts(c["num_experts"], d_model, d_ff, **kwargs).to(dtype)
    rows = PackedRows.from_lengths(torch.tensor(c["lengths"], dtype=torch.long), max(c["lengths"], default=0))
    x_ND = torch.randn(rows.num_rows, d_model, dtype=dtype)
    if c["same_expert"]:  # rows need not lie together in memory
        x_ND = torch.randn(d_model, rows.num_rows, dtype=dtype).t()
    for layout, backends in (
        ("segment", ["segment", "cpu_tiled"]),
        ("token", ["cpu_tiled", "grouped_mm", "reference"]),
    ):
        units, segments = (len(c["lengths"]), rows.segments_B1) if layout == "segment" else (rows.num_rows, None)
        double = make_plan(units, c["num_experts"], c["top_k"], segments, c["shared"])
        if c["same_expert"]:
            double.expert_ids.fill_(c["num_experts"] - 1)
        gates = double.gates.detach().float().requires_grad_()
        shared_gates = double.shared_gates.detach().float().requires_grad_() if c["shared"] else None
        plan = RoutingPlan(double.expert_ids, gates, c["num_experts"], layout, segments, shared_gates)
        with pytest.MonkeyPatch.context() as patch:
            for module in ("cpu_tiled", "segment"):
                patch.setattr(f"mole_asr.moe.backends.{module}.tile_rows", lambda *_: c["tile"])
            for backend in backends:
                assert_close_to_double(x_ND, plan, experts, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("fused", [True, False])
def test_products(fused: bool, activation, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fused:
        monkeypatch.setattr(products, "_has_fused", lambda *_: False)
    x_nI, w_OI, b_O = torch.randn(37, 24).to(dtype), torch.randn(16, 24).to(dtype), torch.randn(16).to(dtype)
    z_nO = x_nI.double() @ w_OI.double().t()
    for bias, expected in ((b_O, z_nO + b_O), (None, z_nO)):
        expected = expected if activation is None else activate(expected, activation)
        found = products.linear(x_nI, w_OI, bias, activation)
        assert (found - expected).norm() / expected.norm() < BOUNDS[dtype][0]
        assert found.dtype == dtype
    assert (products.matmul(x_nI, w_OI.t()) - z_nO).norm() / z_nO.norm() < BOUNDS[dtype][0]


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "grouped_mm"])
def test_no_rows_and_no_slots(backend: str) -> None:
    experts = Experts(3, 8, 16, shared=True)
    for num_rows, top_k in ((0, 2), (4, 0), (0, 0)):
        ids = torch.zeros(num_rows, top_k, dtype=torch.int32)
        gates, shared_gates = torch.rand(num_rows, top_k), torch.rand(num_rows)
        plan = RoutingPlan(ids, gates.requires_grad_(), 3, shared_gates=shared_gates.requires_grad_())
        assert_close_to_double(torch.randn(num_rows, 8), plan, experts, backend)


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment", "grouped_mm"])
def test_gradients_of_biases_are_sums_over_many_rows(backend: str) -> None:
    experts = Experts(2, 8, 16).bfloat16()
    ids, gates = torch.tensor([[1], [0]], dtype=torch.int32), torch.ones(2, 1, requires_grad=True)
    plan = RoutingPlan(ids, gates, 2, "segment", torch.tensor([0, 9000, 9005]))
    assert_close_to_double(torch.randn(9005, 8).bfloat16(), plan, experts, backend)


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment", "grouped_mm"])
def test_bfloat16_autocast_is_close_to_float32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cpu_tiled", "segment"):  # several tiles an expert
        monkeypatch.setattr(f"mole_asr.moe.backends.{module}.tile_rows", lambda *_: 48)
    experts = Experts(5, 48, 96, "silu", shared=True)
    segments = torch.tensor([0, 40, 100, 130, 200])
    gates = torch.rand(4, requires_grad=True)
    ids = torch.tensor([[0], [1], [1], [4]], dtype=torch.int32)
    plan = RoutingPlan(ids, gates[:, None], 5, "segment", segments, 1 - gates)

    def run(autocast: bool) -> list[Tensor]:
        x_ND = torch.randn(200, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_ND = dispatch(x_ND, plan, experts, backend)
        assert y_ND.dtype == torch.float32
        inputs = [x_ND, gates, *experts.parameters()]
        return [y_ND, *torch.autograd.grad(y_ND.square().sum(), inputs, retain_graph=True)]

    for low, full in zip(run(True), run(False), strict=True):
        assert low.dtype == full.dtype
        assert 0 < (low - full).norm() / full.norm() < 1e-2


@pytest.mark.parametrize("backend", ["cpu_tiled", "segment", "grouped_mm"])
def test_bfloat16_rows_and_parameters_without_autocast(backend: str) -> None:
    experts = make_experts(d_model=32, d_ff=64).bfloat16()
    plan = make_plan(3, 3, 2, torch.tensor([0, 30, 50, 90]))
    x_ND = torch.randn(90, 32).bfloat16()
    y_ND = dispatch(x_ND, plan, experts, backend)
    assert y_ND.dtype == torch.bfloat16
    expected = dispatch(x_ND.double(), plan, experts.double(), "reference")
    assert (y_ND - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("backend", ["cpu_tiled", "segment"])
def test_gradients_in_bfloat16_are_summed_in_float32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of tiles: a sum in bfloat16 would stand still at some hundred times an addend."""
    monkeypatch.setattr(f"mole_asr.moe.backends.{backend}.tile_rows", lambda *_: 16)
    experts = Experts(1, 8, 8, "silu", bias=True).bfloat16()
    x_ND = (torch.randn(8000, 8) + 0.5).bfloat16()
    plan = RoutingPlan(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), 1, "segment", torch.tensor([0, 8000]))

    def errors(which: str) -> list[float]:
        exact = copy.deepcopy(experts).double()
        dispatch(x_ND.double(), plan, exact, "reference").sum().backward()
        mine = copy.deepcopy(experts)
        dispatch(x_ND, plan, mine, which).sum().backward()
        pairs = zip(mine.parameters(), exact.parameters(), strict=True)
        return [float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs]

    for found, plain in zip(errors(backend), errors("reference"), strict=True):
        assert found <= 1.5 * plain + 1e-3
