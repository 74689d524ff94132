"""Any plan on a GPU: Triton kernels that nothing waits for.

Shape letters: N rows, K experts a row, S slots a row (K, and one more where there is a shared expert), P = N * S pairs
of a row and an expert, D model width, F expert width, U = 2F with "swiglu", else F.

The pairs are sorted by expert; then an expert's pairs are rows of one matrix product, in tiles that hold pairs of one
expert only. All shapes follow from N, S and E, so the host never asks the device anything, and a captured CUDA graph
may be replayed with other routing: each program finds its expert and rows in the sorted plan, and those beyond the
last tile stop at once. The shared expert is one more expert that every row has a pair with: it costs N more pairs (its
rows are read through the sorted order, though they need none) and no launch of its own.

| launch          | reads                      | writes                    | products        |
|-----------------|----------------------------|---------------------------|-----------------|
| count           | expert ids                 | pairs an expert, by block |                 |
| scatter         | ids, those counts          | order, places, offsets    |                 |
| up              | x (gathered), w1, b1       | a [P, F]; training z [P, U] | 2 P D U FLOPs |
| down            | a, w2, b2, gates           | gate * output [P, D]      | 2 P D F         |
| sum over slots  | those, S rows each         | y [N, D]                  |                 |

The first two run once a plan, however many layers share it. Where S = 1, `down` writes y itself (zeros for rows without
an expert) and the sum falls away: 4 launches, else 5. Backward, from dy [N, D]:

| launch          | reads                      | writes                    | products        |
|-----------------|----------------------------|---------------------------|-----------------|
| hidden          | dy (gathered), w2, z       | dz [P, U], gate * a [P, F], <dA', a> by block of F | 2 P D F |
| gates           | <dA', a>                   | gradient of the gates     |                 |
| rows            | dz, w1                     | [P, D], or dx if S = 1    | 2 P D U         |
| sum over slots  | those                      | dx [N, D]                 |                 |
| weights, twice  | dz, x; dy, gate * a        | w1, b1; w2, b2            | 2 P D U, 2 P D F |
| merge, twice    | parts in float32           | weights of split experts  |                 |

A gate's gradient <dy, output> is <dy @ w2, a> + <dy, b2>, so the outputs need not be kept. Sums over programs are
stored in parts and added in order, never by atomics: the same input gives the same bits. Kept for backward: x, z,
gates, the sorted plan, and under autocast the weights in its type (they get float32 gradients from float32 sums).

Slots without an expert have memory, but nobody reads or writes it. That is the price of not asking how many there are:
a plan with K = E slots (expert choice) allocates N * E rows for a and z.

Under autocast x, dy and the weights are cast first, a launch each. Segments: ids (once a plan), gates and shared gates
are copied to the rows first, a launch each.
Types: float32 (IEEE, or TF32 where `torch.backends.cuda.matmul.fp32_precision` is "tf32"), bfloat16, float16.
Speed has not been measured on a GPU yet; block sizes follow registers and shared memory as compiled for sm_90.

`torch.compile` sees opaque operators (`torch.ops.mole`) with shapes, gradients and no graph break. Autocast is followed
here and not registered with them: a registered rule would cast the gates too.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mole_asr.moe.backends.triton_gradients import gate_gradients, hidden_gradient
from mole_asr.moe.backends.triton_parts import INTERPRETED
from mole_asr.moe.backends.triton_plan import SortedPairs, rows_of_units, sort_pairs
from mole_asr.moe.backends.triton_problem import Problem
from mole_asr.moe.backends.triton_products import down, rows_gradient, up
from mole_asr.moe.backends.triton_weights import WeightGradients, down_gradients, up_gradients
from mole_asr.moe.experts import Activation, Experts, ExpertWeights, compute_dtype
from mole_asr.moe.plan import RoutingPlan


def run(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> Tensor:
    """Compute the plan on a GPU without waiting for it; see `dispatch`.

    An expert id out of range means "no expert" here: the host would have to wait to refuse it.

    Raises:
        ValueError: the rows are not on a GPU, or float64 (Triton's interpreter, TRITON_INTERPRET=1, takes both).
    """
    dtype = compute_dtype(x_ND)
    if not INTERPRETED and (not x_ND.is_cuda or dtype == torch.float64):
        raise ValueError(f"the backend 'triton' computes no {dtype} on {x_ND.device}: use 'auto', or 'reference'")
    pairs, gates_NK, shared_gates_N = _by_row(plan, x_ND.shape[0])
    shared = None if shared_gates_N is None else experts.shared_weights()
    masters: list[Tensor | None] = [*experts.stack(), *(shared or ())]
    weights = [w if w is None else w.detach().contiguous() for w in masters]
    weights[::2] = [w if w is None else w.to(dtype) for w in weights[::2]]  # biases as they are: sums take them
    inputs = [x_ND, gates_NK, shared_gates_N, *masters]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs if t is not None)
    low_ND = x_ND.detach().to(dtype).contiguous()
    y_ND, _ = torch.ops.mole.experts_forward(
        x_ND, gates_NK, shared_gates_N, _present(masters), low_ND, _present(weights), list(pairs),
        experts.activation, keep,
    )  # fmt: skip
    return y_ND


def _by_row(plan: RoutingPlan, num_rows: int) -> tuple[SortedPairs, Tensor, Tensor | None]:
    """The sorted pairs, once a plan; gates and shared gates of each row."""
    if "triton" not in plan.schedules:
        unit_N = None if plan.segments is None else plan.unit_of_row(num_rows)
        ids_NK = plan.expert_ids if unit_N is None else plan.expert_ids.index_select(0, unit_N)
        segments = None if plan.segments is None else plan.segments.to(ids_NK.device)
        pairs = sort_pairs(ids_NK, plan.num_experts, plan.shared_gates is not None)
        plan.schedules["triton"] = pairs, unit_N, segments
    pairs, unit_N, segments = plan.schedules["triton"]
    gates, shared_gates = plan.gates, plan.shared_gates
    if unit_N is not None:
        gates = rows_of_units(gates, unit_N, segments)
        shared_gates = None if shared_gates is None else rows_of_units(shared_gates[:, None], unit_N, segments)[:, 0]
    return pairs, gates.contiguous(), None if shared_gates is None else shared_gates.contiguous()


@torch.library.custom_op("mole::experts_forward", mutates_args=())
def _forward(
    x_ND: Tensor,
    gates_NK: Tensor,
    shared_gates_N: Tensor | None,
    masters: list[Tensor],
    low_ND: Tensor,
    weights: list[Tensor],
    pairs: list[Tensor],
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Rows in the type of x, and the first product of each pair (empty unless kept).

    x and the masters only say where gradients go and of which type they are; the products take `low_ND` and `weights`.
    """
    problem = _problem(gates_NK, shared_gates_N, weights, pairs, activation)
    y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    if problem.num_pairs == 0:
        return y_ND.zero_(), _empty_z(low_ND, gates_NK, shared_gates_N, weights, keep)
    z_PU, a_PF = up(problem, low_ND, keep)
    down(problem, a_PF, (gates_NK, shared_gates_N), y_ND)
    return y_ND, z_PU


@_forward.register_fake
def _(
    x_ND: Tensor,
    gates_NK: Tensor,
    shared_gates_N: Tensor | None,
    masters: list[Tensor],
    low_ND: Tensor,
    weights: list[Tensor],
    pairs: list[Tensor],
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    return y_ND, _empty_z(low_ND, gates_NK, shared_gates_N, weights, keep)


def _empty_z(
    low_ND: Tensor, gates_NK: Tensor, shared_gates_N: Tensor | None, weights: list[Tensor], keep: bool
) -> Tensor:
    slots = gates_NK.shape[1] + (shared_gates_N is not None)
    return low_ND.new_empty(low_ND.shape[0] * slots if keep else 0, weights[0].shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_ND, gates_NK, shared_gates_N, masters, low_ND, weights, pairs, activation, keep = inputs
    _, z_PU = output
    ctx.mark_non_differentiable(z_PU)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gates_NK, shared_gates_N, low_ND, z_PU, *pairs, *weights)
    ctx.activation, ctx.dtypes, ctx.kept = activation, (x_ND.dtype, masters[0].dtype), keep


def _experts_backward(ctx: Any, dy_ND: Tensor | None, _: None) -> tuple[Any, ...]:
    gates_NK, shared_gates_N, low_ND, z_PU, *rest = ctx.saved_tensors
    need_x, need_gates, need_shared_gates, need_weights = ctx.needs_input_grad[:4]
    nothing = (None, [None] * len(rest[3:]), [None] * 3, None, None)
    if dy_ND is None:
        return (None, None, None, [None] * len(rest[3:]), *nothing)
    dx_ND, dgates_NK, dshared_gates_N, dweights = torch.ops.mole.experts_backward(
        dy_ND, gates_NK, shared_gates_N, low_ND, rest[3:], rest[:3], z_PU, ctx.activation, *ctx.dtypes,
        need_x, any(need_weights),
    )  # fmt: skip
    return (
        dx_ND if need_x else None,
        dgates_NK if need_gates else None,
        dshared_gates_N if need_shared_gates else None,
        dweights if any(need_weights) else [None] * len(rest[3:]),
        *nothing,
    )


_forward.register_autograd(_experts_backward, setup_context=_save)


@torch.library.custom_op("mole::experts_backward", mutates_args=())
def _backward(
    dy_ND: Tensor,
    gates_NK: Tensor,
    shared_gates_N: Tensor | None,
    low_ND: Tensor,
    weights: list[Tensor],
    pairs: list[Tensor],
    z_PU: Tensor,
    activation: str,
    row_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    need_rows: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of x (empty unless needed), gates, shared gates, and masters (none unless needed)."""
    problem = _problem(gates_NK, shared_gates_N, weights, pairs, activation)
    result = _empty_gradients(
        gates_NK, shared_gates_N, low_ND, weights, row_dtype, weight_dtype, need_rows, need_weights
    )
    if problem.num_pairs == 0:
        for tensor in (*result[:3], *result[3]):
            tensor.zero_()
        return result
    dx_ND, _, _, dweights = result
    gates = (gates_NK, shared_gates_N)
    dlow_ND = dy_ND.to(low_ND.dtype).contiguous()
    hidden = hidden_gradient(problem, dlow_ND, z_PU, gates)
    dgates_NK, dshared_gates_N = gate_gradients(problem, hidden.dot_PC, low_ND.shape[0])
    if need_rows:
        rows_gradient(problem, hidden.dz_PU, dx_ND)
    if need_weights:
        first = up_gradients(problem, hidden.dz_PU, low_ND, weight_dtype)
        second = down_gradients(problem, dlow_ND, hidden.scaled_PF, gates, weight_dtype)
        dweights = _in_order(first, second)
    if dshared_gates_N is None:
        dshared_gates_N = dgates_NK.new_empty(0)
    shared_dtype = dgates_NK.dtype if shared_gates_N is None else shared_gates_N.dtype
    return dx_ND, dgates_NK.to(gates_NK.dtype), dshared_gates_N.to(shared_dtype), dweights


def _in_order(first: WeightGradients, second: WeightGradients) -> list[Tensor]:
    stack = (first.weight, first.bias, second.weight, second.bias)
    shared = (first.shared_weight, first.shared_bias, second.shared_weight, second.shared_bias)
    return _present([*stack, *shared])


@_backward.register_fake
def _(
    dy_ND: Tensor,
    gates_NK: Tensor,
    shared_gates_N: Tensor | None,
    low_ND: Tensor,
    weights: list[Tensor],
    pairs: list[Tensor],
    z_PU: Tensor,
    activation: str,
    row_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    need_rows: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return _empty_gradients(gates_NK, shared_gates_N, low_ND, weights, row_dtype, weight_dtype, need_rows, need_weights)


def _empty_gradients(
    gates_NK: Tensor,
    shared_gates_N: Tensor | None,
    low_ND: Tensor,
    weights: list[Tensor],
    row_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    need_rows: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dx_ND = low_ND.new_empty(low_ND.shape if need_rows else (0,), dtype=row_dtype)
    shared = gates_NK.new_empty(0) if shared_gates_N is None else torch.empty_like(shared_gates_N)
    dweights = [torch.empty_like(weight, dtype=weight_dtype) for weight in weights] if need_weights else []
    return dx_ND, torch.empty_like(gates_NK), shared, dweights


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _problem(
    gates_NK: Tensor, shared_gates_N: Tensor | None, weights: list[Tensor], pairs: list[Tensor], activation: str
) -> Problem:
    half = len(weights) // 2
    has_shared = shared_gates_N is not None
    stack, shared = (weights[:half], _parts(weights[half:])) if has_shared else (weights, None)
    slots = gates_NK.shape[1] + has_shared
    return Problem(SortedPairs(*pairs), slots, _parts(stack), shared, cast(Activation, activation))


def _parts(present: list[Tensor]) -> ExpertWeights:
    """The inverse of `_present`: a bias has a dimension less than the weights."""
    w1, *rest = present
    b1 = rest.pop(0) if rest[0].dim() < w1.dim() else None
    w2, b2 = rest if len(rest) == 2 else (rest[0], None)
    return ExpertWeights(w1, b1, w2, b2)
