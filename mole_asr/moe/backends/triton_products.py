"""Triton: matrix products over rows, forward and for the gradient of the rows, and the sum over slots.

Shape letters: N rows, S slots a row, P = N * S pairs at their sorted places, G groups (experts, then the shared one),
D model width, F expert width, U = 2F with "swiglu", else F.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mole_asr.moe.backends.triton_parts import (
    INTERPRETED,
    activated,
    find_tile,
    load_gates,
    most_tiles,
    narrow,
    of_group,
    power_of_two,
    row_product,
    silu,
    swizzle,
    wrapped,
)
from mole_asr.moe.backends.triton_problem import Problem


def up(problem: Problem, x_ND: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The first product and the activation of every pair: (z_PU, empty unless kept; a_PF)."""
    width, depth = problem.d_ff, problem.d_model
    blocks = problem.blocks(width, depth, wide=problem.activation != "swiglu")
    a_PF = x_ND.new_empty(problem.num_pairs, width)
    z_PU = x_ND.new_empty(problem.num_pairs if keep else 0, problem.up_width)
    tiles = most_tiles(problem.num_pairs, problem.groups, blocks.rows)
    w1, b1, _, _ = problem.stack
    shared_w1, shared_b1, _, _ = problem.shared or (None,) * 4
    with torch.cuda.device_of(x_ND):
        _up_kernel[(tiles * triton.cdiv(width, blocks.columns),)](
            x_ND, w1, b1, shared_w1, shared_b1, *problem.pairs[:2], z_PU, a_PF, tiles,
            D=depth, F=width, ACTIVATION=problem.activation, HAS_BIAS=b1 is not None, KEEP=keep,
            **problem.meta(), **blocks.meta(),
        )  # fmt: skip
    return z_PU, a_PF


def down(problem: Problem, a_PF: Tensor, gates: tuple[Tensor, Tensor | None], y_ND: Tensor) -> None:
    """The second product times the gate, summed over the slots of each row, into `y_ND`."""
    _, _, w2, b2 = problem.stack
    _, _, shared_w2, shared_b2 = problem.shared or (None,) * 4
    _rows(problem, a_PF, (w2, b2, shared_w2, shared_b2), gates, (1, problem.d_ff), y_ND)


def rows_gradient(problem: Problem, dz_PU: Tensor, dx_ND: Tensor) -> None:
    """The gradient of the rows from that of the first product, summed over slots, into `dx_ND`."""
    shared_w1 = None if problem.shared is None else problem.shared.w1_FD
    _rows(problem, dz_PU, (problem.stack.w1_FD, None, shared_w1, None), (None, None), (problem.d_model, 1), dx_ND)


def _rows(
    problem: Problem,
    in_PI: Tensor,
    weights: tuple[Tensor | None, ...],
    gates: tuple[Tensor | None, Tensor | None],
    strides: tuple[int, int],
    out_ND: Tensor,
) -> None:
    """out[n] = sum over slots of gate * (in @ W + bias); `strides` are those of W's depth and columns."""
    depth, width = in_PI.shape[1], out_ND.shape[1]
    blocks = problem.blocks(width, depth)
    single = problem.slots == 1  # a row has one pair: its result is the row's, and rows without one become zero here
    tiles = most_tiles(problem.num_pairs, problem.groups + single, blocks.rows)
    sorted_PD = out_ND if single else in_PI.new_empty(problem.num_pairs, width)
    w, b, shared_w, shared_b = weights
    with torch.cuda.device_of(in_PI):
        _rows_kernel[(tiles * triton.cdiv(width, blocks.columns),)](
            in_PI, w, b, shared_w, shared_b, *gates, *problem.pairs[:2], sorted_PD, tiles,
            DEPTH=depth, COLUMNS=width, DEPTH_STRIDE=strides[0], COLUMN_STRIDE=strides[1],
            HAS_BIAS=b is not None, GATED=gates[0] is not None, SINGLE=single, **problem.meta(), **blocks.meta(),
        )  # fmt: skip
        if not single:
            columns = min(1024, power_of_two(width))
            block = (max(1, 4096 // columns), columns)
            grid = (triton.cdiv(out_ND.shape[0], block[0]), triton.cdiv(width, columns))
            _sum_slots_kernel[grid](
                sorted_PD, problem.pairs.place_P, out_ND, out_ND.shape[0], WIDTH=width, SLOTS=problem.slots,
                ACC=problem.accumulator, UPCAST=INTERPRETED, BLOCK_M=block[0], BLOCK_N=block[1],
            )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def _up_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    b_ptr: tl.tensor,
    shared_w_ptr: tl.tensor,
    shared_b_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    pair_ptr: tl.tensor,
    z_ptr: tl.tensor,
    a_ptr: tl.tensor,
    tiles: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Gather rows, first product, bias, activation: a block of a tile's places and of F."""
    tile, block = swizzle(tl.program_id(0), tiles, (F + BLOCK_N - 1) // BLOCK_N)
    group, first, end = find_tile(offsets_ptr, tile, GROUPS, WIDTH, BLOCK_M)
    if first >= end:
        return
    gated: tl.constexpr = ACTIVATION == "swiglu"
    up_width: tl.constexpr = 2 * F if gated else F
    last: tl.constexpr = GROUPS - 1 if SHARED else -1
    place = first + tl.arange(0, BLOCK_M)
    row = tl.load(pair_ptr + place, mask=place < end, other=0) // SLOTS
    row_ptrs = x_ptr + row.to(tl.int64) * D
    weight_ptr = of_group(w_ptr, shared_w_ptr, group, up_width * D, last)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = wrapped(column, F, BLOCK_N)
    z = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    z = row_product(z, row_ptrs, weight_ptr, weight_row, D, 1, D, BLOCK_K, ACC, PRECISION, UPCAST)
    if HAS_BIAS:
        bias_ptr = of_group(b_ptr, shared_b_ptr, group, up_width, last)
        z += tl.load(bias_ptr + weight_row).to(ACC)[None, :]
    keep = (place < end)[:, None] & (column < F)[None, :]
    z_ptrs = z_ptr + place.to(tl.int64)[:, None] * up_width + column[None, :]
    TYPE: tl.constexpr = a_ptr.dtype.element_ty
    if KEEP:
        tl.store(z_ptrs, narrow(z, TYPE, UPCAST), mask=keep)
    if gated:
        value = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
        value = row_product(value, row_ptrs, weight_ptr, F + weight_row, D, 1, D, BLOCK_K, ACC, PRECISION, UPCAST)
        if HAS_BIAS:
            value += tl.load(bias_ptr + F + weight_row).to(ACC)[None, :]
        if KEEP:
            tl.store(z_ptrs + F, narrow(value, TYPE, UPCAST), mask=keep)
        a = silu(z) * value
    else:
        a = activated(z, ACTIVATION)
    tl.store(a_ptr + place.to(tl.int64)[:, None] * F + column[None, :], narrow(a, TYPE, UPCAST), mask=keep)


@triton.jit(do_not_specialize=["tiles"])
def _rows_kernel(
    in_ptr: tl.tensor,
    w_ptr: tl.tensor,
    b_ptr: tl.tensor,
    shared_w_ptr: tl.tensor,
    shared_b_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    shared_gates_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    pair_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tiles: tl.tensor,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    SINGLE: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Rows at their places times a weight, plus bias, times gate; stored by place, or by row where SINGLE."""
    tile, block = swizzle(tl.program_id(0), tiles, (COLUMNS + BLOCK_N - 1) // BLOCK_N)
    group, first, end = find_tile(offsets_ptr, tile, GROUPS + SINGLE, WIDTH, BLOCK_M)
    if first >= end:
        return
    last: tl.constexpr = GROUPS - 1 if SHARED else -1
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    place = first + tl.arange(0, BLOCK_M)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < end
    keep = inside[:, None] & (column < COLUMNS)[None, :]
    pair = tl.load(pair_ptr + place, mask=inside, other=0)
    out_row = pair if SINGLE else place
    out_ptrs = out_ptr + out_row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    if SINGLE:  # noqa: SIM102 - decided when the kernel is compiled, the next one when it runs
        if group == GROUPS:  # rows without an expert
            tl.store(out_ptrs, tl.full((BLOCK_M, BLOCK_N), 0, TYPE), mask=keep)
            return
    weight_ptr = of_group(w_ptr, shared_w_ptr, group, DEPTH * COLUMNS, last)
    weight_column = wrapped(column, COLUMNS, BLOCK_N)
    # Places behind the end belong to other pairs or to nobody: what is computed for them is not stored.
    row_ptrs = in_ptr + tl.where(inside, place, first).to(tl.int64) * DEPTH
    out = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    out = row_product(
        out, row_ptrs, weight_ptr, weight_column, DEPTH, DEPTH_STRIDE, COLUMN_STRIDE, BLOCK_K, ACC, PRECISION, UPCAST
    )
    if HAS_BIAS:
        bias_ptr = of_group(b_ptr, shared_b_ptr, group, COLUMNS, last)
        out += tl.load(bias_ptr + weight_column).to(ACC)[None, :]
    if GATED:
        out *= load_gates(gates_ptr, shared_gates_ptr, pair, inside, SLOTS, SHARED, ACC)[:, None]
    tl.store(out_ptrs, narrow(out, TYPE, UPCAST), mask=keep)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_slots_kernel(
    in_ptr: tl.tensor,
    place_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """out[n] = sum of the rows at the places of n's pairs; slots without an expert are not read."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    sums = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for slot in range(SLOTS):
        place = tl.load(place_ptr + row * SLOTS + slot, mask=row < num_rows, other=-1)
        ptrs = in_ptr + place.to(tl.int64)[:, None] * WIDTH + column[None, :]
        sums += tl.load(ptrs, mask=inside & (place >= 0)[:, None], other=0.0).to(ACC)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out_ptrs, narrow(sums, out_ptr.dtype.element_ty, UPCAST), mask=inside)
