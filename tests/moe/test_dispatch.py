"""All backends against the reference, and the reference against a computation written out by hand."""

import sys

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from mole_asr.moe import Experts, PackedRows, RoutingPlan, choose_backend, dispatch
from mole_asr.moe.backends import tiles
from mole_asr.moe.experts import ExpertWeights, feed_forward
from tests.moe.dispatched import ACTIVATIONS, assert_same, cases, experts_and_rows, gradients, make_experts, make_plan


def by_hand(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> Tensor:
    """Row by row, slot by slot."""
    token = plan.to_token_layout(len(x_ND))
    rows = []
    for n, x_D in enumerate(x_ND):
        y_D = torch.zeros_like(x_D)
        for k in range(plan.top_k):
            expert = int(token.expert_ids[n, k])
            if expert < plan.num_experts:
                weights = ExpertWeights(*(None if t is None else t[expert] for t in experts.stack()))
                y_D = y_D + token.gates[n, k] * feed_forward(x_D, weights, experts.activation)
        if token.shared_gates is not None:
            shared = experts.shared_weights()
            assert shared is not None
            y_D = y_D + token.shared_gates[n] * feed_forward(x_D, shared, experts.activation)
        rows.append(y_D)
    return torch.stack(rows) if rows else torch.zeros_like(x_ND)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment"])
def test_backend_equals_the_sum_written_out(backend: str, bias: bool, activation: str) -> None:
    experts = make_experts(activation=activation, bias=bias)
    rows = PackedRows.from_lengths(torch.tensor([3, 0, 4, 1, 2]), 4)
    plan = make_plan(5, 3, 2, rows.segments_B1)
    x_ND = torch.randn(10, 5, dtype=torch.float64)
    assert_same(gradients(x_ND, plan, experts, backend), gradients(x_ND, plan, experts, by_hand))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_backends_equal_the_reference(case: tuple[int, dict]) -> None:
    seed, c = case
    torch.manual_seed(seed)
    experts = make_experts(
        c["num_experts"], c["d_model"], c["d_ff"], activation=c["activation"], bias=c["bias"], shared=c["shared"]
    )
    rows = PackedRows.from_lengths(torch.tensor(c["lengths"], dtype=torch.long), max(c["lengths"], default=0))
    plan = make_plan(len(c["lengths"]), c["num_experts"], c["top_k"], rows.segments_B1, c["shared"])
    if c["same_expert"]:
        plan.expert_ids.fill_(c["num_experts"] - 1)
    x_ND = torch.randn(rows.num_rows, c["d_model"], dtype=torch.float64)
    expected = gradients(x_ND, plan, experts, "reference")
    with pytest.MonkeyPatch.context() as patch:
        for module in ("cpu_tiled", "segment"):
            patch.setattr(f"mole_asr.moe.backends.{module}.tile_rows", lambda *_: c["tile"])
        assert_same(gradients(x_ND, plan, experts, "segment"), expected)
        assert_same(gradients(x_ND, plan, experts, "cpu_tiled"), expected)
        token_plan = make_plan(rows.num_rows, c["num_experts"], c["top_k"], shared=c["shared"])
        expected = gradients(x_ND, token_plan, experts, "reference")
        assert_same(gradients(x_ND, token_plan, experts, "cpu_tiled"), expected)


def test_grouped_mm_says_what_it_cannot_group() -> None:
    for experts, x_ND in (
        (Experts(3, 8, 16).double(), torch.randn(4, 8).double()),
        (Experts(3, 8, 10), torch.randn(4, 8)),
        (Experts(3, 12, 16).bfloat16(), torch.randn(4, 12).bfloat16()),
    ):
        plan = RoutingPlan(torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1), 3)
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            dispatch(x_ND, plan, experts, "grouped_mm")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment"])
def test_gradcheck(backend: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cpu_tiled", "segment"):
        monkeypatch.setattr(f"mole_asr.moe.backends.{module}.tile_rows", lambda *_: 3)
    experts = make_experts(3, 4, 3, activation=activation)
    names, parameters = zip(*experts.named_parameters(), strict=True)
    segments = torch.tensor([0, 4, 5, 9])
    plan = make_plan(3, 3, 2, segments)

    def run(x_ND: Tensor, gates: Tensor, shared_gates: Tensor, *values: Tensor) -> Tensor:
        own = RoutingPlan(plan.expert_ids, gates, 3, "segment", segments, shared_gates)
        holder = Holder(experts, own, backend)
        return torch.func.functional_call(
            holder, {f"experts.{n}": v for n, v in zip(names, values, strict=True)}, (x_ND,)
        )

    x_ND = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x_ND, plan.gates, plan.shared_gates, *parameters), fast_mode=True)


class Holder(nn.Module):
    def __init__(self, experts: Experts, plan: RoutingPlan, backend: str) -> None:
        super().__init__()
        self.experts, self.plan, self.backend = experts, plan, backend

    def forward(self, x_ND: Tensor) -> Tensor:
        return dispatch(x_ND, self.plan, self.experts, self.backend)


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled"])
def test_all_slices_of_a_dense_layer_are_the_dense_layer(backend: str) -> None:
    dense = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6, bias=False)).double()
    experts = make_experts(4, 6, 3, activation="relu", shared=False)
    with torch.no_grad():
        experts.w1_EFD.copy_(dense[0].weight.view(4, 3, 6))
        experts.b1_EF.copy_(dense[0].bias.view(4, 3))
        experts.w2_EDF.copy_(dense[2].weight.view(6, 4, 3).transpose(0, 1))
        experts.b2_ED.zero_()
    x_ND = torch.randn(20, 6, dtype=torch.float64)
    ids = torch.stack([torch.randperm(4) for _ in range(20)]).int()
    plan = RoutingPlan(ids, torch.ones(20, 4, dtype=torch.float64), 4)
    torch.testing.assert_close(dispatch(x_ND, plan, experts, backend), dense(x_ND), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment"])
def test_gate_one_is_the_language_expert_and_gate_zero_the_agnostic_one(backend: str) -> None:
    experts = make_experts()
    segments = torch.tensor([0, 3, 7])
    ids = torch.tensor([[2], [0]], dtype=torch.int32)
    x_ND = torch.randn(7, 5, dtype=torch.float64)
    shared = experts.shared_weights()
    assert shared is not None
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    language = dispatch(x_ND, RoutingPlan(ids, one[:, None], 3, "segment", segments, zero), experts, backend)
    own = [feed_forward(x_ND[a:b], experts.unbind()[e], "silu") for a, b, e in ((0, 3, 2), (3, 7, 0))]
    torch.testing.assert_close(language, torch.cat(own))
    agnostic = dispatch(x_ND, RoutingPlan(ids, zero[:, None], 3, "segment", segments, one), experts, backend)
    torch.testing.assert_close(agnostic, feed_forward(x_ND, shared, "silu"))


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment", "grouped_mm"])
def test_same_input_gives_the_same_bits(backend: str) -> None:
    experts, x_ND = experts_and_rows(backend, 60)
    plan = make_plan(4, 3, 2, torch.tensor([0, 10, 30, 31, 60]))
    assert_same(gradients(x_ND, plan, experts, backend), gradients(x_ND, plan, experts, backend), atol=0, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "grouped_mm"])
def test_permuting_rows_permutes_the_output(backend: str) -> None:
    experts, x_ND = experts_and_rows(backend, 40)
    plan = make_plan(40, 3, 2)
    assert plan.shared_gates is not None
    order = torch.randperm(40)
    permuted = RoutingPlan(plan.expert_ids[order], plan.gates[order], 3, shared_gates=plan.shared_gates[order])
    torch.testing.assert_close(
        dispatch(x_ND[order], permuted, experts, backend), dispatch(x_ND, plan, experts, backend)[order]
    )


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment", "grouped_mm"])
def test_a_slot_without_expert_is_as_if_it_were_not_there(backend: str) -> None:
    experts, x_ND = experts_and_rows(backend, 9, shared=False)
    segments = torch.tensor([0, 4, 9]) if backend == "segment" else None
    units = 2 if backend == "segment" else 9
    plan = make_plan(units, 3, 1, segments, shared=False, sentinels=False)
    empty_ids = torch.full((units, 1), 3, dtype=torch.int32)
    # A gate that is not a number shows that the slot is skipped, not multiplied by zero.
    gates = torch.cat([plan.gates, torch.full((units, 1), torch.nan, dtype=torch.float64)], 1)
    wider = RoutingPlan(torch.cat([plan.expert_ids, empty_ids], 1), gates, 3, plan.layout, segments)
    atol = 1e-5 if backend == "grouped_mm" else 0  # its vectors of numbers begin elsewhere
    found, expected = (
        [y_ND := dispatch(x_ND, its, experts, backend), *torch.autograd.grad(y_ND.sum(), list(experts.parameters()))]
        for its in (wider, plan)
    )
    assert_same(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment", "grouped_mm"])
def test_an_expert_without_rows_has_a_gradient_of_exactly_zero(backend: str) -> None:
    experts, x_ND = experts_and_rows(backend, 9)
    plan = make_plan(2, 3, 1, torch.tensor([0, 4, 9]), shared=False)
    plan.expert_ids.fill_(1)
    dispatch(x_ND, plan, experts, backend).sum().backward()
    for tensor in experts.stack():
        assert tensor.grad[1].abs().sum() > 0
        assert torch.count_nonzero(tensor.grad[[0, 2]]) == 0
    assert experts.shared_w1_FD.grad is None, "what the plan leaves out is not even decayed by an optimizer"


def test_frozen_experts_still_pass_the_gradient_on() -> None:
    experts = make_experts().requires_grad_(False)
    plan = make_plan(2, 3, 1, torch.tensor([0, 4, 9]))
    x_ND = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(dispatch(x_ND, plan, experts).sum(), [x_ND, plan.gates])
    expected = torch.autograd.grad(dispatch(x_ND, plan, experts, "reference").sum(), [x_ND, plan.gates])
    assert_same(list(found), list(expected))


def test_checkpointed_layers_give_the_same_gradients() -> None:
    experts = make_experts()
    plan = make_plan(2, 3, 1, torch.tensor([0, 4, 9]))

    def run(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> Tensor:
        call = lambda x: dispatch(x, plan, experts)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(call, x_ND, use_reentrant=False)

    x_ND = torch.randn(9, 5, dtype=torch.float64)
    assert_same(gradients(x_ND, plan, experts, run), gradients(x_ND, plan, experts, "segment"))


def test_no_temporary_of_a_tile_exceeds_sixteen_megabytes() -> None:
    for d_ff in (64, 1024, 8192, 65536):
        experts = Experts(1, 1, d_ff)
        for dtype in (torch.float32, torch.bfloat16):
            assert tiles.tile_rows(experts, dtype) * d_ff * dtype.itemsize <= 16 << 20
    assert list(tiles.split(3, 10, 3)) == [(3, 5), (5, 7), (7, 10)]
    assert list(tiles.split(3, 3, 3)) == []


def test_neighbouring_segments_of_one_expert_are_one_product() -> None:
    experts = make_experts(shared=False)
    ids = torch.tensor([[1], [0], [1], [3], [2], [2]], dtype=torch.int32)
    segments = torch.tensor([0, 4, 4, 9, 12, 13, 20])
    plan = RoutingPlan(ids, torch.ones(6, 1, dtype=torch.float64), 3, "segment", segments)
    dispatch(torch.randn(20, 5, dtype=torch.float64), plan, experts)
    dispatch(torch.randn(20, 5, dtype=torch.float64), plan, experts)
    (schedule,) = plan.schedules.values()  # worked out once, and used by the second layer too
    assert [(tile.expert, tile.rows) for tile in schedule.tiles] == [(1, slice(0, 9)), (2, slice(12, 20))]


def test_choose_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("cpu", torch.float32, "token") == "cpu_tiled"
    assert choose_backend("cpu", torch.bfloat16, "segment") == "segment"
    assert choose_backend("cuda", torch.bfloat16, "token") == "triton"
    assert choose_backend("cuda", torch.float64, "token") == "reference"
    assert choose_backend("cuda", torch.float64, "segment") == "segment"
    monkeypatch.setattr(sys.modules["mole_asr.moe.dispatch"], "_HAS_TRITON", False)
    assert choose_backend("cuda", torch.bfloat16, "token", (256, 1024)) == "grouped_mm"
    assert choose_backend("cuda", torch.bfloat16, "token", (256, 1028)) == "reference"
    assert choose_backend("cuda", torch.bfloat16, "segment", (256, 1024)) == "segment"


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment"])
@pytest.mark.parametrize("wrong", [-1, 4, 256])
def test_ids_that_no_expert_has_are_refused(backend: str, wrong: int) -> None:
    plan = make_plan(2, 3, 1, torch.tensor([0, 4, 9]))
    plan.expert_ids[1] = wrong
    with pytest.raises(ValueError, match=r"expert_ids must lie in 0\.\.3, found"):
        dispatch(torch.randn(9, 5, dtype=torch.float64), plan, make_experts(), backend)


def test_what_does_not_fit_together_is_refused() -> None:
    experts = make_experts(shared=False)
    x_ND = torch.randn(4, 5, dtype=torch.float64)
    plan = make_plan(4, 3, 1, shared=False)
    bad = {
        r"rows must be \[N, 5\]": (x_ND[:, :4], plan, "auto"),
        "plan is for 4 rows, not 3": (x_ND[:3], plan, "auto"),
        "plan is for 2 experts, not 3": (x_ND, make_plan(4, 2, 1, shared=False), "auto"),
        "shared=True": (x_ND, make_plan(4, 3, 1), "auto"),
        "use one type or autocast": (x_ND.float(), plan, "auto"),
        "backend must be": (x_ND, plan, "fastest"),
        "needs a plan in the layout 'segment'": (x_ND, plan, "segment"),
        "segments hold 3 rows": (x_ND, make_plan(1, 3, 1, torch.tensor([0, 3]), shared=False), "auto"),
    }
    for message, (rows, its_plan, backend) in bad.items():
        with pytest.raises(ValueError, match=message):
            dispatch(rows, its_plan, experts, backend)
