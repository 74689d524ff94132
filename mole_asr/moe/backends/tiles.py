"""Experts on tiles of rows, forward and backward by hand: what the CPU backends share.

A tile is up to some hundred rows that one expert computes. A backend only decides which rows make a tile. Working
tile by tile keeps every temporary small: the C library maps and faults in blocks of more than 32 MB anew at each use,
which costs more than all routing.

Shape letters: N rows, P pairs of a row and an expert (in tile order), n rows of a tile, D model width, F expert width.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mole_asr.moe.experts import Activation, Experts, ExpertWeights, activate
from mole_asr.moe.plan import RoutingPlan

SHARED = -1
"""The expert number of the shared expert in a tile."""

_TILE_BYTES = 4 << 20
_MAX_TILE_ROWS = 1024


class Tile(NamedTuple):
    """Rows that one expert computes: a slice of the batch, or gathered by index; and their places among the pairs."""

    expert: int
    rows: slice | Tensor
    pairs: slice


class Schedule(NamedTuple):
    """All tiles of a plan, and for each pair its place in `flat_gates`."""

    tiles: list[Tile]
    gate_index_P: Tensor


def tile_rows(experts: Experts, dtype: torch.dtype) -> int:
    """The most rows of a tile, so that the widest temporary stays near 4 MB (16 MB at the very most)."""
    width = experts.w1_EFD.shape[1]
    return max(16, min(_MAX_TILE_ROWS, _TILE_BYTES // (width * dtype.itemsize)))


def split(start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut a range into the fewest nearly equal parts of at most `limit`."""
    parts = -(-(end - start) // limit)
    for part in range(parts):
        yield start + (end - start) * part // parts, start + (end - start) * (part + 1) // parts


def shared_tiles(num_rows: int, first_pair: int, limit: int) -> list[Tile]:
    """The tiles of the shared expert: every row, in order."""
    return [
        Tile(SHARED, slice(start, end), slice(first_pair + start, first_pair + end))
        for start, end in split(0, num_rows, limit)
    ]


def compute_dtype(x_ND: Tensor) -> torch.dtype:
    """The type the products are computed in: autocast's if it is on (never for float64), else that of x."""
    device = x_ND.device.type
    if torch.is_autocast_enabled(device) and x_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x_ND.dtype


def run_tiles(x_ND: Tensor, plan: RoutingPlan, experts: Experts, schedule: Schedule) -> Tensor:
    """Compute all tiles of a schedule; differentiable in rows, gates and parameters."""
    flat_gates = plan.gates.reshape(-1)
    if plan.shared_gates is not None:
        flat_gates = torch.cat([flat_gates, plan.shared_gates])
    gates_P = flat_gates.index_select(0, schedule.gate_index_P)
    stack, shared = experts.stack(), experts.shared_weights() or (None,) * 4
    recipe = _Recipe(schedule.tiles, experts.activation, compute_dtype(x_ND), torch.is_grad_enabled())
    return _TiledExperts.apply(x_ND, gates_P, recipe, *stack, *shared)


class _Recipe(NamedTuple):
    tiles: list[Tile]
    activation: Activation
    dtype: torch.dtype
    training: bool


class _TiledExperts(torch.autograd.Function):
    """Inputs after the recipe: w1, b1, w2, b2 of the stack, then of the shared expert (None where missing)."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gates_P: Tensor, recipe: _Recipe, *parameters: Tensor | None) -> Tensor:
        tiles, activation, dtype, training = recipe
        keep_outputs = training and ctx.needs_input_grad[1]
        weights = _cast_used(tiles, parameters, dtype)
        x = x_ND.to(dtype)
        y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(dtype, torch.float32))
        kept: list[Tensor | None] = []
        for expert, rows, pairs in tiles:
            w1_FD, b1_F, w2_DF, b2_D = weights[expert]
            z_nF = functional.linear(x[rows], w1_FD, b1_F)
            a_nF = activate(z_nF, activation)
            out_nD = functional.linear(a_nF, w2_DF, b2_D)
            _add_rows(y_ND, rows, out_nD * gates_P[pairs, None])
            if training:
                kept += [None if activation == "relu" else z_nF, a_nF, out_nD if keep_outputs else None]
        if training:
            ctx.recipe, ctx.experts = recipe, list(weights)
            ctx.like = [None if p is None else (p.shape, p.dtype) for p in parameters]
            ctx.x_dtype = x_ND.dtype
            flat_weights = [tensor for expert_weights in weights.values() for tensor in expert_weights]
            ctx.save_for_backward(x, gates_P, *flat_weights, *kept)
        return y_ND.to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x, gates_P, *saved = ctx.saved_tensors
        weights = {expert: ExpertWeights(*saved[4 * i : 4 * i + 4]) for i, expert in enumerate(ctx.experts)}
        kept = iter(saved[4 * len(weights) :])
        need_x, need_gates = ctx.needs_input_grad[:2]
        dx_ND = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if need_x else None
        dgates_P = torch.zeros_like(gates_P) if need_gates else None
        grads = [None if like is None else torch.zeros(like[0], dtype=like[1], device=x.device) for like in ctx.like]
        with torch.autocast(x.device.type, enabled=False):
            for expert, rows, pairs in ctx.recipe.tiles:
                z_nF, a_nF, out_nD = next(kept), next(kept), next(kept)
                w1_FD, _, w2_DF, _ = weights[expert]
                dy_nD = dy_ND[rows]
                if dgates_P is not None:
                    dgates_P[pairs] = (dy_nD * out_nD).sum(-1, dtype=dgates_P.dtype)
                dout_nD = (dy_nD * gates_P[pairs, None]).to(x.dtype)
                dz_nF = _activation_backward(dout_nD @ w2_DF, z_nF, a_nF, ctx.recipe.activation)
                if dx_ND is not None:
                    _add_rows(dx_ND, rows, dz_nF @ w1_FD)
                dw1, db1, dw2, db2 = (
                    grads[4:] if expert == SHARED else (g if g is None else g[expert] for g in grads[:4])
                )
                _add_product(dw1, dz_nF, x[rows])
                _add_product(dw2, dout_nD, a_nF)
                if db1 is not None and db2 is not None:
                    db1 += dz_nF.sum(0, dtype=db1.dtype)
                    db2 += dout_nD.sum(0, dtype=db2.dtype)
        return (None if dx_ND is None else dx_ND.to(ctx.x_dtype), dgates_P, None, *grads)


def _cast_used(
    tiles: list[Tile], parameters: tuple[Tensor | None, ...], dtype: torch.dtype
) -> dict[int, ExpertWeights]:
    """The weights of the experts that have rows, in the type of the products (master weights stay float32)."""
    weights = {}
    for expert in dict.fromkeys(tile.expert for tile in tiles):
        w1, b1, w2, b2 = (None if tensor is None else tensor.to(dtype) for tensor in _of_expert(parameters, expert))
        assert w1 is not None and w2 is not None
        weights[expert] = ExpertWeights(w1, b1, w2, b2)
    return weights


def _of_expert(tensors: Sequence[Tensor | None], expert: int) -> Sequence[Tensor | None]:
    """One expert's part of eight tensors: w1, b1, w2, b2 of the stack, then of the shared expert."""
    if expert == SHARED:
        return tensors[4:]
    return [None if tensor is None else tensor[expert] for tensor in tensors[:4]]


def _add_rows(total_ND: Tensor, rows: slice | Tensor, part_nD: Tensor) -> None:
    if isinstance(rows, slice):
        total_ND[rows] += part_nD
    else:
        total_ND.index_add_(0, rows, part_nD.to(total_ND.dtype))


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> None:
    """Add left^T right to a gradient, which is float32 where the products are in a smaller type."""
    assert total is not None
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def _activation_backward(da_nF: Tensor, z_nF: Tensor | None, a_nF: Tensor, activation: Activation) -> Tensor:
    if z_nF is None:
        return torch.ops.aten.threshold_backward(da_nF, a_nF, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(da_nF, z_nF)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da_nF, z_nF)
    gate_nF, value_nF = z_nF.chunk(2, dim=-1)
    dgate_nF = torch.ops.aten.silu_backward(da_nF * value_nF, gate_nF)
    return torch.cat([dgate_nF, da_nF * functional.silu(gate_nF)], dim=-1)
