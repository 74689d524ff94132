"""Experts on tiles of rows, forward and backward by hand: what the CPU backends share.

A tile is up to some thousand rows that one expert computes. A backend only decides which rows make a tile. Working
tile by tile keeps every temporary small: the C library maps and faults in blocks of more than 32 MB anew at each use,
which costs more than all routing.

Tiles of the shared expert come first and cover every row: they write where later tiles add.

Shape letters: N rows, P pairs of a row and an expert (in tile order), n rows of a tile, D model width, F expert width.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mole_asr.moe.backends.products import linear, matmul, pack
from mole_asr.moe.experts import Activation, Experts, ExpertWeights, activate, activate_gate, compute_dtype
from mole_asr.moe.plan import RoutingPlan

SHARED = -1
"""The expert number of the shared expert in a tile."""

_TILE_BYTES = 8 << 20
_MAX_TILE_ROWS = 2048
_PACKING_PAYS = 1 << 28
"""Multiplications of one product, over all tiles of an expert, below which packing costs more than it saves."""


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
    """The most rows of a tile, so that the widest temporary stays near 8 MB (16 MB at the very most)."""
    width = max(experts.w1_EFD.shape[1:])
    return max(16, min(_MAX_TILE_ROWS, _TILE_BYTES // (width * dtype.itemsize)))


def split(start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut a range into the fewest nearly equal parts of at most `limit`."""
    parts = -(-(end - start) // limit)
    for part in range(parts):
        yield start + (end - start) * part // parts, start + (end - start) * (part + 1) // parts


def shared_tiles(num_rows: int, limit: int) -> list[Tile]:
    """The tiles of the shared expert: every row, in order. They and their pairs are the first of a schedule."""
    return [Tile(SHARED, slice(start, end), slice(start, end)) for start, end in split(0, num_rows, limit)]


def run_tiles(x_ND: Tensor, plan: RoutingPlan, experts: Experts, schedule: Schedule) -> Tensor:
    """Compute all tiles of a schedule; differentiable in rows, gates and parameters."""
    flat_gates = plan.gates.reshape(-1)
    if plan.shared_gates is not None:
        flat_gates = torch.cat([flat_gates, plan.shared_gates])
    gates_P = flat_gates.index_select(0, schedule.gate_index_P)
    shared = experts.shared_weights() if plan.shared_gates is not None else None
    recipe = _Recipe(schedule.tiles, experts.activation, compute_dtype(x_ND), torch.is_grad_enabled())
    return _TiledExperts.apply(x_ND, gates_P, recipe, *experts.stack(), *(shared or (None,) * 4))


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
        training = training and any(ctx.needs_input_grad)
        keep_outputs = training and ctx.needs_input_grad[1]
        keep_inputs = training and activation != "relu"
        weights = _cast_used(tiles, parameters, dtype, packed=not training)
        cast_ND = x_ND.to(dtype)
        y_ND = _new_sum(x_ND, x_ND.dtype, tiles)
        # Slices of a dense FFN have gates of one: a product is saved. A GPU would have to be waited for to know.
        weighted = training or gates_P.is_cuda or bool((gates_P != 1).any())
        kept: list[Tensor | None] = []
        for expert, rows, pairs in tiles:
            w1_FD, b1_F, w2_DF, b2_D = weights[expert]
            x_nD = _take(cast_ND, rows)
            z_nF = linear(x_nD, w1_FD, b1_F) if keep_inputs else None
            a_nF = linear(x_nD, w1_FD, b1_F, activation) if z_nF is None else activate(z_nF, activation)
            out_nD = linear(a_nF, w2_DF, b2_D)
            if training:
                kept += [z_nF, a_nF, out_nD if keep_outputs else None]
            part_nD = out_nD.to(y_ND.dtype, copy=keep_outputs)
            _add(y_ND, rows, part_nD.mul_(gates_P[pairs, None]) if weighted else part_nD, first=expert == SHARED)
        if training:
            ctx.recipe, ctx.experts, ctx.x_dtype = recipe, list(weights), x_ND.dtype
            ctx.like = [None if p is None else (p.shape, p.dtype) for p in parameters]
            flat_weights = [tensor for expert_weights in weights.values() for tensor in expert_weights]
            ctx.save_for_backward(cast_ND, gates_P, *flat_weights, *kept)
        return y_ND.to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_P, *saved = ctx.saved_tensors
        tiles, activation, dtype, _ = ctx.recipe
        weights = {expert: ExpertWeights(*saved[4 * i : 4 * i + 4]) for i, expert in enumerate(ctx.experts)}
        kept = iter(saved[4 * len(weights) :])
        need_x, need_gates = ctx.needs_input_grad[:2]
        dx_ND = _new_sum(x_ND, ctx.x_dtype, tiles) if need_x else None
        dgates_P = torch.empty_like(gates_P) if need_gates else None
        grads = _ParameterGradients(ctx.like, x_ND.device) if any(ctx.needs_input_grad[3:]) else None
        with torch.autocast(x_ND.device.type, enabled=False):
            for expert, rows, pairs in tiles:
                z_nF, a_nF, out_nD = next(kept), next(kept), next(kept)
                w1_FD, _, w2_DF, _ = weights[expert]
                dy_nD = _take(dy_ND, rows).to(torch.promote_types(dy_ND.dtype, torch.float32))
                if dgates_P is not None:
                    dgates_P[pairs] = torch.linalg.vecdot(dy_nD, out_nD.to(dy_nD.dtype))
                dout_nD = (dy_nD * gates_P[pairs, None]).to(dtype)
                dz_nF = _activation_backward(matmul(dout_nD, w2_DF), z_nF, a_nF, activation)
                if dx_ND is not None:
                    _add(dx_ND, rows, matmul(dz_nF, w1_FD).to(dx_ND.dtype), first=expert == SHARED)
                if grads is not None:
                    grads.add(expert, _take(x_ND, rows), dz_nF, a_nF, dout_nD)
        if dx_ND is not None:
            dx_ND = dx_ND.to(ctx.x_dtype)
        return (dx_ND, dgates_P, None, *([None] * 8 if grads is None else grads.finish()))


def _new_sum(x_ND: Tensor, dtype: torch.dtype, tiles: list[Tile]) -> Tensor:
    """Where tiles are summed, in at least float32: zeros, but for tiles of the shared expert, which write every row."""
    make = torch.empty_like if tiles and tiles[0].expert == SHARED else torch.zeros_like
    return make(x_ND, dtype=torch.promote_types(dtype, torch.float32), memory_format=torch.contiguous_format)


def _take(x_ND: Tensor, rows: slice | Tensor) -> Tensor:
    return x_ND[rows] if isinstance(rows, slice) else x_ND.index_select(0, rows)


def _add(total_ND: Tensor, rows: slice | Tensor, part_nD: Tensor, first: bool) -> None:
    """Add a tile to the sum; the first part of a slice of rows overwrites them."""
    if not isinstance(rows, slice):
        total_ND.index_add_(0, rows, part_nD)
    elif first:
        total_ND[rows] = part_nD
    else:
        total_ND[rows] += part_nD


class _ParameterGradients:
    """Gradients of all parameters, summed over tiles in at least float32: a sum of many in bfloat16 stands still.

    Memory is written when an expert first has rows, not before.
    """

    def __init__(self, like: list[tuple[torch.Size, torch.dtype] | None], device: torch.device) -> None:
        self.like = like
        self.grads = [
            None
            if one is None
            else torch.empty(one[0], dtype=torch.promote_types(one[1], torch.float32), device=device)
            for one in like
        ]
        self.seen: set[int] = set()

    def add(self, expert: int, x_nD: Tensor, dz_nF: Tensor, a_nF: Tensor, dout_nD: Tensor) -> None:
        """Add one tile's share."""
        first = expert not in self.seen
        self.seen.add(expert)
        dw1_FD, db1_F, dw2_DF, db2_D = _of_expert(self.grads, expert)
        for total, left, right in ((dw1_FD, dz_nF, x_nD), (dw2_DF, dout_nD, a_nF)):
            assert total is not None
            if total.dtype != left.dtype:  # float32 gradients of products in a smaller type
                product = left.t() @ right
                total.copy_(product) if first else total.add_(product)
            else:
                torch.mm(left.t(), right, out=total) if first else total.addmm_(left.t(), right)
        for bias, rows in ((db1_F, dz_nF), (db2_D, dout_nD)):
            if bias is not None:
                summed = rows.sum(0, dtype=bias.dtype)
                bias.copy_(summed) if first else bias.add_(summed)

    def finish(self) -> list[Tensor | None]:
        """All gradients; zero for the experts without rows."""
        stack = [grad for grad in self.grads[:4] if grad is not None]
        shared = [grad for grad in self.grads[4:] if grad is not None]
        for grad in stack:
            for expert in set(range(grad.shape[0])) - self.seen:
                grad[expert].zero_()
        if SHARED not in self.seen:
            for grad in shared:
                grad.zero_()
        pairs = zip(self.grads, self.like, strict=True)
        return [None if grad is None or one is None else grad.to(one[1]) for grad, one in pairs]


def _cast_used(
    tiles: list[Tile], parameters: tuple[Tensor | None, ...], dtype: torch.dtype, packed: bool
) -> dict[int, ExpertWeights]:
    """The weights of the experts that have rows, in the type of the products (master weights stay float32).

    With `packed`, those of experts with several tiles and much to compute in a layout that only `linear` can read.
    """
    weights, num_rows = {}, Counter[int]()
    for tile in tiles:
        num_rows[tile.expert] += tile.pairs.stop - tile.pairs.start
    for expert, num_tiles in Counter(tile.expert for tile in tiles).items():
        w1, b1, w2, b2 = (None if tensor is None else tensor.to(dtype) for tensor in _of_expert(parameters, expert))
        assert w1 is not None and w2 is not None
        if packed and num_tiles > 1 and num_rows[expert] * w2.numel() >= _PACKING_PAYS:
            w1, w2 = pack(w1, _MAX_TILE_ROWS), pack(w2, _MAX_TILE_ROWS)
        weights[expert] = ExpertWeights(w1, b1, w2, b2)
    return weights


def _of_expert(tensors: Sequence[Tensor | None], expert: int) -> Sequence[Tensor | None]:
    """One expert's part of eight tensors: w1, b1, w2, b2 of the stack, then of the shared expert."""
    if expert == SHARED:
        return tensors[4:]
    return [None if tensor is None else tensor[expert] for tensor in tensors[:4]]


def _activation_backward(da_nF: Tensor, z_nF: Tensor | None, a_nF: Tensor, activation: Activation) -> Tensor:
    if z_nF is None:
        return torch.ops.aten.threshold_backward(da_nF, a_nF, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(da_nF, z_nF)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da_nF, z_nF)
    gate_nF, value_nF = z_nF.chunk(2, dim=-1)
    dgated_nF = da_nF * value_nF
    if activation == "swiglu":
        dgate_nF = torch.ops.aten.silu_backward(dgated_nF, gate_nF)
    elif activation == "reglu":
        dgate_nF = torch.ops.aten.threshold_backward(dgated_nF, gate_nF, 0)
    else:
        dgate_nF = torch.ops.aten.gelu_backward(dgated_nF, gate_nF, approximate="tanh")
    return torch.cat([dgate_nF, da_nF * activate_gate(gate_nF, activation)], dim=-1)
