"""Triton: gradients of the hidden rows and of the gates.

Shape letters: N rows, S slots a row, P = N * S pairs at their sorted places, G groups (experts, then the shared one),
D model width, F expert width, U = 2F with "swiglu", else F.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mole_asr.moe.backends.triton_parts import (
    activated,
    find_tile,
    load_gates,
    most_tiles,
    narrow,
    of_group,
    power_of_two,
    row_product,
    slope,
    swizzle,
    wrapped,
)
from mole_asr.moe.backends.triton_problem import Problem


class HiddenGradient(NamedTuple):
    """What the gradient of the activations gives, by place.

    Attributes:
        dz_PU: gradient of the first product.
        scaled_PF: gate * activation, a factor of the second weight's gradient.
        dot_PC: the gate's gradient, summed over each of C blocks of F.
    """

    dz_PU: Tensor
    scaled_PF: Tensor
    dot_PC: Tensor


def hidden_gradient(
    problem: Problem, dy_ND: Tensor, z_PU: Tensor, gates: tuple[Tensor, Tensor | None]
) -> HiddenGradient:
    """Back through second product, gate and activation: A' = dy @ W2, then <A', a> and gate * A' * slope."""
    depth, width = problem.d_model, problem.d_ff
    blocks = problem.blocks(width, depth, wide=False)
    columns = triton.cdiv(width, blocks.columns)
    dz_PU, scaled_PF = torch.empty_like(z_PU), z_PU.new_empty(z_PU.shape[0], width)
    dot_PC = torch.empty(z_PU.shape[0], columns, dtype=problem.sum_dtype, device=z_PU.device)
    tiles = most_tiles(problem.num_pairs, problem.groups, blocks.rows)
    _, _, w2, b2 = problem.stack
    _, _, shared_w2, shared_b2 = problem.shared or (None,) * 4
    with torch.cuda.device_of(dy_ND):
        _hidden_kernel[(tiles * columns,)](
            dy_ND, w2, b2, shared_w2, shared_b2, *gates, *problem.pairs[:2], z_PU, dz_PU, scaled_PF, dot_PC, tiles,
            D=depth, F=width, ACTIVATION=problem.activation, HAS_BIAS=b2 is not None,
            **problem.meta(), **blocks.meta(),
        )  # fmt: skip
    return HiddenGradient(dz_PU, scaled_PF, dot_PC)


def gate_gradients(problem: Problem, dot_PC: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """The gradients of gates [N, K] and shared gates [N]; zero where no expert is."""
    shared = problem.shared is not None
    dgates_NK = dot_PC.new_empty(num_rows, problem.slots - shared)
    dshared_N = dot_PC.new_empty(num_rows) if shared else None
    columns = dot_PC.shape[1]
    block = max(1, 1024 // power_of_two(columns))
    with torch.cuda.device_of(dot_PC):
        _gate_kernel[(triton.cdiv(problem.num_pairs, block),)](
            dot_PC, problem.pairs.place_P, dgates_NK, dshared_N, problem.num_pairs, COLUMNS=columns,
            COLUMNS_WIDTH=power_of_two(columns), SLOTS=problem.slots, SHARED=shared, BLOCK=block,
        )  # fmt: skip
    return dgates_NK, dshared_N


@triton.jit(do_not_specialize=["tiles"])
def _hidden_kernel(
    dy_ptr: tl.tensor,
    w_ptr: tl.tensor,
    b_ptr: tl.tensor,
    shared_w_ptr: tl.tensor,
    shared_b_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    shared_gates_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    pair_ptr: tl.tensor,
    z_ptr: tl.tensor,
    dz_ptr: tl.tensor,
    scaled_ptr: tl.tensor,
    dot_ptr: tl.tensor,
    tiles: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    """A block of a tile's places and of F; dy is gathered, the activation computed again from z."""
    columns: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile, block = swizzle(tl.program_id(0), tiles, columns)
    group, first, end = find_tile(offsets_ptr, tile, GROUPS, WIDTH, BLOCK_M)
    if first >= end:
        return
    gated: tl.constexpr = ACTIVATION == "swiglu"
    up_width: tl.constexpr = 2 * F if gated else F
    last: tl.constexpr = GROUPS - 1 if SHARED else -1
    TYPE: tl.constexpr = dz_ptr.dtype.element_ty
    place = first + tl.arange(0, BLOCK_M)
    inside = place < end
    pair = tl.load(pair_ptr + place, mask=inside, other=0)
    row_ptrs = dy_ptr + (pair // SLOTS).to(tl.int64) * D
    weight_ptr = of_group(w_ptr, shared_w_ptr, group, D * F, last)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    da = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    da = row_product(da, row_ptrs, weight_ptr, wrapped(column, F, BLOCK_N), D, F, 1, BLOCK_K, ACC, PRECISION, UPCAST)
    gate = load_gates(gates_ptr, shared_gates_ptr, pair, inside, SLOTS, SHARED, ACC)[:, None]
    keep = inside[:, None] & (column < F)[None, :]
    da = tl.where(keep, da, 0.0)
    offset = place.to(tl.int64)[:, None] * up_width + column[None, :]
    z = tl.load(z_ptr + offset, mask=keep, other=0.0).to(ACC)
    if gated:
        value = tl.load(z_ptr + offset + F, mask=keep, other=0.0).to(ACC)
        half = activated(z, "silu")
        a = half * value
        tl.store(dz_ptr + offset + F, narrow(gate * da * half, TYPE, UPCAST), mask=keep)
        dz = gate * da * value * slope(z, "silu")
    else:
        a = activated(z, ACTIVATION)
        dz = gate * da * slope(z, ACTIVATION)
    tl.store(dz_ptr + offset, narrow(dz, TYPE, UPCAST), mask=keep)
    scaled_ptrs = scaled_ptr + place.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(scaled_ptrs, narrow(gate * a, TYPE, UPCAST), mask=keep)
    dot = tl.sum(da * a, axis=1)
    if HAS_BIAS:  # noqa: SIM102 - decided when the kernel is compiled, the next one when it runs
        if block == 0:  # the gate scales the bias too
            bias_ptr = of_group(b_ptr, shared_b_ptr, group, D, last)
            depth = tl.arange(0, BLOCK_K)
            for start in range(0, D, BLOCK_K):
                real = start + depth < D
                dy = tl.load(row_ptrs[:, None] + (start + depth)[None, :], mask=real[None, :], other=0.0).to(ACC)
                bias = tl.load(bias_ptr + start + depth, mask=real, other=0.0).to(ACC)
                dot += tl.sum(dy * bias[None, :], axis=1)
    tl.store(dot_ptr + place.to(tl.int64) * columns + block, dot, mask=inside)


@triton.jit(do_not_specialize=["num_pairs"])
def _gate_kernel(
    dot_ptr: tl.tensor,
    place_ptr: tl.tensor,
    dgates_ptr: tl.tensor,
    dshared_ptr: tl.tensor,
    num_pairs: tl.tensor,
    COLUMNS: tl.constexpr,
    COLUMNS_WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each pair's sum over the blocks of F, in order."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    place = tl.load(place_ptr + pair, mask=inside, other=-1)
    column = tl.arange(0, COLUMNS_WIDTH)
    real = (place >= 0)[:, None] & (column < COLUMNS)[None, :]
    dot = tl.load(dot_ptr + place.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=real, other=0.0)
    gradient = tl.sum(dot, axis=1)
    if SHARED:
        row = pair // SLOTS
        slot = pair % SLOTS
        tl.store(dgates_ptr + row * (SLOTS - 1) + slot, gradient, mask=inside & (slot < SLOTS - 1))
        tl.store(dshared_ptr + row, gradient, mask=inside & (slot == SLOTS - 1))
    else:
        tl.store(dgates_ptr + pair, gradient, mask=inside)
