"""Triton: gradients of weights and biases.

Shape letters: N rows, S slots a row, P = N * S pairs at their sorted places, G groups (experts, then the shared one),
D model width, F expert width, U = 2F with "swiglu", else F.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mole_asr.moe.backends.triton_parts import (
    INTERPRETED,
    bound,
    load_gates,
    narrow,
    of_group,
    operand,
    power_of_two,
    wrapped,
)
from mole_asr.moe.backends.triton_problem import Problem, block_sizes

_PROGRAMS = 264
"""Two programs for each of the 132 processors of an H100: with fewer tiles, an expert's rows are split."""


class WeightGradients(NamedTuple):
    """Gradients of a weight and a bias of all experts, then of the shared expert; None where there is none."""

    weight: Tensor
    bias: Tensor | None
    shared_weight: Tensor | None
    shared_bias: Tensor | None


def up_gradients(problem: Problem, dz_PU: Tensor, x_ND: Tensor, dtype: torch.dtype) -> WeightGradients:
    """The gradients of the first weight and bias."""
    return _weight_gradients(problem, dz_PU, x_ND, None, problem.stack.b1_F is not None, dtype)


def down_gradients(
    problem: Problem, dy_ND: Tensor, scaled_PF: Tensor, gates: tuple[Tensor, Tensor | None], dtype: torch.dtype
) -> WeightGradients:
    """The gradients of the second weight and bias."""
    return _weight_gradients(problem, dy_ND, scaled_PF, gates, problem.stack.b2_D is not None, dtype)


def _weight_gradients(
    problem: Problem,
    left: Tensor,
    right: Tensor,
    gates: tuple[Tensor, Tensor | None] | None,
    has_bias: bool,
    dtype: torch.dtype,
) -> WeightGradients:
    """Each group's left^T @ right over its pairs, and the sum of its left rows.

    With gates, left is a row of the batch and the bias sums gate * left; without, right is a row of the batch.
    """
    height, width = left.shape[1], right.shape[1]
    size = (height, width)
    experts, shared = problem.stack.w1_FD.shape[0], problem.shared is not None
    grads = WeightGradients(
        left.new_empty(experts, *size, dtype=dtype),
        left.new_empty(experts, height, dtype=dtype) if has_bias else None,
        left.new_empty(size, dtype=dtype) if shared else None,
        left.new_empty(height, dtype=dtype) if shared and has_bias else None,
    )
    blocks = block_sizes(height, width, problem.num_pairs, problem.dtype)
    blocks = blocks._replace(stages=blocks.stages + 1)  # one stage is spent on reading which rows to gather
    blocks_of_weight = triton.cdiv(height, blocks.rows) * triton.cdiv(width, blocks.columns)
    split = split_rows(problem.num_pairs, blocks_of_weight, blocks.depth)
    chunks = problem.num_pairs // split + problem.groups
    # An expert of more than `split` pairs has at most 2 * pairs / split chunks, and only such an expert has several.
    num_parts = 2 * problem.num_pairs // split if split < problem.num_pairs else 0
    parts = left.new_empty(num_parts, height * width + height, dtype=problem.sum_dtype)
    common = {"ROWS": height, "COLUMNS": width, "HAS_BIAS": has_bias}
    with torch.cuda.device_of(left):
        _weight_kernel[(chunks * blocks_of_weight,)](
            left, right, *(gates or (None, None)), *problem.pairs[:2], *grads, parts, split,
            GATHER_LEFT=gates is not None, **common, **problem.meta(), **blocks.meta(),
        )  # fmt: skip
        if num_parts:
            grid = (problem.groups, triton.cdiv(parts.shape[1], 1024))
            _merge_kernel[grid](
                problem.pairs.offsets, *grads, parts, split, **common, GROUPS=problem.groups,
                WIDTH=power_of_two(problem.groups + 1), SHARED=shared, ACC=problem.accumulator, UPCAST=INTERPRETED,
                BLOCK=1024,
            )  # fmt: skip
    return grads


def split_rows(num_pairs: int, blocks: int, depth: int) -> int:
    """The most pairs that one program adds up, so that the rows of one expert alone can fill the device.

    It depends on the number of pairs and not on where they go, so it needs no answer from the device.
    """
    parts = triton.cdiv(_PROGRAMS, blocks)
    return max(16 * depth, triton.cdiv(num_pairs, parts))


@triton.jit
def _chunks_of(
    offsets_ptr: tl.tensor, split: tl.tensor, GROUPS: tl.constexpr, WIDTH: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """First place and end of each group, in how many chunks it is added up, and its number."""
    groups = tl.arange(0, WIDTH)
    start = tl.load(offsets_ptr + groups, mask=groups < GROUPS, other=0)
    end = tl.load(offsets_ptr + groups + 1, mask=groups < GROUPS, other=0)
    chunks = tl.maximum((end - start + split - 1) // split, 1)  # one without pairs writes the zeros
    return start, end, tl.where(groups < GROUPS, chunks, 0), groups


@triton.jit(do_not_specialize=["split"])
def _weight_kernel(
    left_ptr: tl.tensor,
    right_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    shared_gates_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    pair_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    db_ptr: tl.tensor,
    shared_dw_ptr: tl.tensor,
    shared_db_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    split: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
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
    """A block of one group's weight over one chunk of its pairs; straight to the result if it is the only chunk."""
    blocks_across: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = blocks_across * ((ROWS + BLOCK_M - 1) // BLOCK_M)
    chunk = tl.program_id(0) // blocks
    row_block = (tl.program_id(0) % blocks) // blocks_across
    column_block = tl.program_id(0) % blocks_across
    starts, ends, chunks, groups = _chunks_of(offsets_ptr, split, GROUPS, WIDTH)
    chunks_end = tl.cumsum(chunks, axis=0)
    group = tl.sum((chunks_end <= chunk).to(tl.int32), axis=0)
    if group >= GROUPS:
        return
    mine = groups == group
    count = tl.sum(tl.where(mine, chunks, 0), axis=0)
    number = chunk - tl.sum(tl.where(mine, chunks_end, 0), axis=0) + count
    end = tl.sum(tl.where(mine, ends, 0), axis=0)
    first = tl.sum(tl.where(mine, starts, 0), axis=0)
    rows = ((end - first + count - 1) // count + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    first = tl.minimum(first + number * rows, end)
    end = tl.minimum(first + rows, end)

    row_of_weight = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    left_column = wrapped(row_of_weight, ROWS, BLOCK_M)
    right_column = wrapped(column, COLUMNS, BLOCK_N)
    sums = tl.full((BLOCK_M, BLOCK_N), 0, ACC)
    for start in range(bound(first), bound(end), BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        inside = place < end
        row = (tl.load(pair_ptr + place, mask=inside, other=0) // SLOTS).to(tl.int64)
        left_row = row if GATHER_LEFT else place.to(tl.int64)
        right_row = place.to(tl.int64) if GATHER_LEFT else row
        left_ptrs = left_ptr + left_row[None, :] * ROWS + left_column[:, None]
        right_ptrs = right_ptr + right_row[:, None] * COLUMNS + right_column[None, :]
        left = operand(tl.load(left_ptrs, mask=inside[None, :], other=0.0), ACC, UPCAST)
        right = operand(tl.load(right_ptrs, mask=inside[:, None], other=0.0), ACC, UPCAST)
        sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=ACC)
    last: tl.constexpr = GROUPS - 1 if SHARED else -1
    several = tl.where(chunks > 1, chunks, 0)
    part = tl.sum(tl.where(groups < group, several, 0), axis=0) + number
    part_ptr = parts_ptr + part.to(tl.int64) * (ROWS * COLUMNS + ROWS)
    offset = row_of_weight[:, None] * COLUMNS + column[None, :]
    keep = (row_of_weight < ROWS)[:, None] & (column < COLUMNS)[None, :]
    TYPE: tl.constexpr = dw_ptr.dtype.element_ty
    if count > 1:
        tl.store(part_ptr + offset, sums, mask=keep)
    else:
        weight_ptr = of_group(dw_ptr, shared_dw_ptr, group, ROWS * COLUMNS, last)
        tl.store(weight_ptr + offset, narrow(sums, TYPE, UPCAST), mask=keep)
    if HAS_BIAS:  # noqa: SIM102 - decided when the kernel is compiled, the next one when it runs
        if column_block == 0:
            bias = _sum_left(
                left_ptr, left_column, gates_ptr, shared_gates_ptr, pair_ptr, first, end,
                ROWS, GATHER_LEFT, SLOTS, SHARED, ACC, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            if count > 1:
                tl.store(part_ptr + ROWS * COLUMNS + row_of_weight, bias, mask=row_of_weight < ROWS)
            else:
                bias_ptr = of_group(db_ptr, shared_db_ptr, group, ROWS, last)
                tl.store(bias_ptr + row_of_weight, narrow(bias, TYPE, UPCAST), mask=row_of_weight < ROWS)


@triton.jit
def _sum_left(
    left_ptr: tl.tensor,
    left_column: tl.tensor,
    gates_ptr: tl.tensor,
    shared_gates_ptr: tl.tensor,
    pair_ptr: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    ROWS: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The sum of left rows, times their gates where they are gathered: a loop of its own, as few programs need it."""
    sums = tl.full((BLOCK_M,), 0, ACC)
    for start in range(bound(first), bound(end), BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        inside = place < end
        pair = tl.load(pair_ptr + place, mask=inside, other=0)
        left_row = (pair // SLOTS if GATHER_LEFT else place).to(tl.int64)
        left_ptrs = left_ptr + left_row[:, None] * ROWS + left_column[None, :]
        left = tl.load(left_ptrs, mask=inside[:, None], other=0.0).to(ACC)
        if GATHER_LEFT:
            left *= load_gates(gates_ptr, shared_gates_ptr, pair, inside, SLOTS, SHARED, ACC)[:, None]
        sums += tl.sum(left, axis=0)
    return sums


@triton.jit(do_not_specialize=["split"])
def _merge_kernel(
    offsets_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    db_ptr: tl.tensor,
    shared_dw_ptr: tl.tensor,
    shared_db_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    split: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add up the chunks of a group that has several, in order."""
    group = tl.program_id(0)
    _, _, chunks, groups = _chunks_of(offsets_ptr, split, GROUPS, WIDTH)
    count = tl.sum(tl.where(groups == group, chunks, 0), axis=0)
    if count <= 1:
        return
    part = tl.sum(tl.where((groups < group) & (chunks > 1), chunks, 0), axis=0)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size: tl.constexpr = ROWS * COLUMNS + ROWS
    inside = element < size if HAS_BIAS else element < ROWS * COLUMNS
    sums = tl.full((BLOCK,), 0, ACC)
    for number in range(0, bound(count)):
        sums += tl.load(parts_ptr + (part + number).to(tl.int64) * size + element, mask=inside, other=0.0)
    last: tl.constexpr = GROUPS - 1 if SHARED else -1
    TYPE: tl.constexpr = dw_ptr.dtype.element_ty
    weight_ptr = of_group(dw_ptr, shared_dw_ptr, group, ROWS * COLUMNS, last)
    sums = narrow(sums, TYPE, UPCAST)
    tl.store(weight_ptr + element, sums, mask=element < ROWS * COLUMNS)
    if HAS_BIAS:
        bias_ptr = of_group(db_ptr, shared_db_ptr, group, ROWS, last)
        tl.store(bias_ptr + element - ROWS * COLUMNS, sums, mask=inside & (element >= ROWS * COLUMNS))
