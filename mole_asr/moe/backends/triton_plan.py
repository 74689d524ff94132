"""Triton: sort the pairs of a row and an expert by expert.

A stable counting sort in two launches, without atomics and without waiting for the device, so the same ids give the
same bits. Its result does not depend on block sizes: one sort serves all products and all layers that share a plan.

Shape letters: N rows, K experts a row, S slots a row (K, and one more for a shared expert), P = N * S pairs, G groups:
the E experts, then the shared expert if there is one. Pair p is slot p % S of row p // S. Pairs without an expert
come behind all groups.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mole_asr.moe.backends.triton_parts import INTERPRETED, bound, narrow, power_of_two

_PAIRS_A_PROGRAM = 1024
_MAX_PROGRAMS = 256
_ONE_HOT_SIZE = 8192


class SortedPairs(NamedTuple):
    """Where each pair stands after sorting.

    Attributes:
        offsets: int32 [G + 2], first place of each group, then of the pairs without an expert, then P.
        pair_P: int32, the pair at each place.
        place_P: int32, the place of each pair; -1 without an expert.
    """

    offsets: Tensor
    pair_P: Tensor
    place_P: Tensor


def sort_pairs(expert_ids: Tensor, num_experts: int, shared: bool) -> SortedPairs:
    """Sort all pairs by expert; of one expert, by row and slot.

    Args:
        expert_ids: int32 [N, K]; everything outside 0..num_experts-1 means "no expert".
        num_experts: E.
        shared: whether each row has one more pair, with the shared expert.
    """
    return SortedPairs(*torch.ops.mole.sort_pairs(expert_ids, num_experts, shared))


@torch.library.custom_op("mole::sort_pairs", mutates_args=())
def _sort_pairs(expert_ids: Tensor, num_experts: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    sizes = _sizes(expert_ids, num_experts, shared)
    offsets, pair_P, place_P = (expert_ids.new_empty(size) for size in sizes)
    num_pairs, groups = pair_P.numel(), sizes[0] - 2
    if num_pairs >= 2**31:
        raise ValueError(f"the backend 'triton' sorts at most 2**31 - 1 pairs of a row and an expert, not {num_pairs}")
    if num_pairs == 0:
        return offsets.zero_(), pair_P, place_P
    width = power_of_two(groups + 1)
    sub = max(16, min(256, _ONE_HOT_SIZE // width))
    steps = power_of_two(max(_PAIRS_A_PROGRAM // sub, triton.cdiv(num_pairs, _MAX_PROGRAMS * sub)))
    programs = triton.cdiv(num_pairs, sub * steps)
    counts = expert_ids.new_empty(programs, width)
    ids = expert_ids.contiguous()
    meta = {"K": expert_ids.shape[1], "EXPERTS": num_experts, "GROUPS": groups, "WIDTH": width}
    meta |= {"SUB": sub, "STEPS": steps}
    with torch.cuda.device_of(ids):
        _count_kernel[(programs,)](ids, counts, num_pairs, **meta)
        _scatter_kernel[(programs,)](ids, counts, offsets, pair_P, place_P, num_pairs, programs, **meta)
    return offsets, pair_P, place_P


@_sort_pairs.register_fake
def _(expert_ids: Tensor, num_experts: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    offsets, pair_P, place_P = (expert_ids.new_empty(size) for size in _sizes(expert_ids, num_experts, shared))
    return offsets, pair_P, place_P


def _sizes(expert_ids: Tensor, num_experts: int, shared: bool) -> tuple[int, int, int]:
    num_pairs = expert_ids.shape[0] * (expert_ids.shape[1] + shared)
    return num_experts + shared + 2, num_pairs, num_pairs


def rows_of_units(values_UK: Tensor, unit_N: Tensor, segments: Tensor) -> Tensor:
    """The values of each row's unit; torch's own way to sum their gradient on a GPU gives other bits each time.

    Args:
        values_UK: a row of values for each segment.
        unit_N: int64, each row's segment.
        segments: integers [U + 1] on the same device, offsets of the segments' first rows.
    """
    return torch.ops.mole.rows_of_units(values_UK, unit_N, segments)


@torch.library.custom_op("mole::rows_of_units", mutates_args=())
def _rows_of_units(values_UK: Tensor, unit_N: Tensor, segments: Tensor) -> Tensor:
    return values_UK.index_select(0, unit_N)


@_rows_of_units.register_fake
def _(values_UK: Tensor, unit_N: Tensor, segments: Tensor) -> Tensor:
    return values_UK.new_empty(unit_N.shape[0], values_UK.shape[1])


def _save_segments(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _rows_of_units_backward(ctx: Any, d_NK: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.mole.sum_units(d_NK, ctx.saved_tensors[0]), None, None


_rows_of_units.register_autograd(_rows_of_units_backward, setup_context=_save_segments)


@torch.library.custom_op("mole::sum_units", mutates_args=())
def _sum_units(d_NK: Tensor, segments: Tensor) -> Tensor:
    units, top_k = segments.shape[0] - 1, d_NK.shape[1]
    d_UK = d_NK.new_empty(units, top_k)
    if d_UK.numel():
        accumulator = tl.float64 if d_NK.dtype == torch.float64 else tl.float32
        width = power_of_two(top_k)
        with torch.cuda.device_of(d_NK):
            _sum_units_kernel[(units,)](
                d_NK.contiguous(), segments, d_UK, K=top_k, WIDTH=width, ACC=accumulator, UPCAST=INTERPRETED,
                BLOCK=max(1, 1024 // width),
            )  # fmt: skip
    return d_UK


@_sum_units.register_fake
def _(d_NK: Tensor, segments: Tensor) -> Tensor:
    return d_NK.new_empty(segments.shape[0] - 1, d_NK.shape[1])


@triton.jit
def _sum_units_kernel(
    d_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    out_ptr: tl.tensor,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program sums the rows of one segment, in order."""
    unit = tl.program_id(0)
    first = tl.load(segments_ptr + unit)
    end = tl.load(segments_ptr + unit + 1)
    column = tl.arange(0, WIDTH)
    sums = tl.full((WIDTH,), 0, ACC)
    for start in range(bound(first), bound(end), BLOCK):
        row = start + tl.arange(0, BLOCK)
        keep = (row < end)[:, None] & (column < K)[None, :]
        sums += tl.sum(tl.load(d_ptr + row[:, None] * K + column[None, :], mask=keep, other=0.0).to(ACC), axis=0)
    tl.store(out_ptr + unit * K + column, narrow(sums, out_ptr.dtype.element_ty, UPCAST), mask=column < K)


@triton.jit
def _groups_of(
    ids_ptr: tl.tensor,
    pair: tl.tensor,
    num_pairs: tl.tensor,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    """The group of each pair; GROUPS without an expert, GROUPS + 1 beyond the last pair."""
    slots: tl.constexpr = K + GROUPS - EXPERTS
    row = pair // slots
    slot = pair % slots
    inside = pair < num_pairs
    expert = tl.load(ids_ptr + row * K + slot, mask=inside & (slot < K), other=EXPERTS)
    expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, GROUPS)
    expert = tl.where(slot < K, expert, EXPERTS)
    return tl.where(inside, expert, GROUPS + 1)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_pairs: tl.tensor,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SUB: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """counts[program, group] of the program's SUB * STEPS pairs."""
    program = tl.program_id(0)
    groups = tl.arange(0, WIDTH)
    counts = tl.full((WIDTH,), 0, tl.int32)
    for step in range(STEPS):
        pair = (program * STEPS + step) * SUB + tl.arange(0, SUB)
        group = _groups_of(ids_ptr, pair, num_pairs, K, EXPERTS, GROUPS)
        counts += tl.sum((group[:, None] == groups[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + program * WIDTH + groups, counts)


@triton.jit(do_not_specialize=["num_pairs", "programs"])
def _scatter_kernel(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    pair_ptr: tl.tensor,
    place_ptr: tl.tensor,
    num_pairs: tl.tensor,
    programs: tl.tensor,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SUB: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Each program adds up all counts itself: a few kilobytes from the cache instead of a launch for a scan."""
    program = tl.program_id(0)
    groups = tl.arange(0, WIDTH)
    total = tl.full((WIDTH,), 0, tl.int32)
    before = tl.full((WIDTH,), 0, tl.int32)
    for first in range(0, bound(programs), 16):
        other = first + tl.arange(0, 16)
        counts = tl.load(
            counts_ptr + other[:, None] * WIDTH + groups[None, :], mask=(other < programs)[:, None], other=0
        )
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((other < program)[:, None], counts, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    if program == 0:
        tl.store(offsets_ptr + groups, ends - total, mask=groups <= GROUPS)
        tl.store(offsets_ptr + GROUPS + 1, num_pairs)
    next_place = ends - total + before
    for step in range(STEPS):
        pair = (program * STEPS + step) * SUB + tl.arange(0, SUB)
        group = _groups_of(ids_ptr, pair, num_pairs, K, EXPERTS, GROUPS)
        one_hot = (group[:, None] == groups[None, :]).to(tl.int32)
        rank = tl.cumsum(one_hot, axis=0) - 1 + next_place[None, :]
        place = tl.sum(one_hot * rank, axis=1)
        inside = pair < num_pairs
        tl.store(pair_ptr + place, pair, mask=inside)
        tl.store(place_ptr + pair, tl.where(group < GROUPS, place, -1), mask=inside)
        next_place += tl.sum(one_hot, axis=0)
