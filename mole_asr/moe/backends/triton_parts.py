"""Triton: pieces that the kernels are put together from.

Shape letters: N rows, S slots a row, P = N * S pairs at their sorted places, G groups (experts, then the shared one).
"""

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels; TRITON_INTERPRET=1 decides it when Triton is first imported."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


# Up to numpy 2.3 the interpreter takes its tensors as bounds of `range`, from 2.4 on it cannot. There a kernel is
# plain Python, so a plain function can take the number out; for the compiler it does nothing.
if INTERPRETED:

    def bound(value: tl.tensor) -> int:
        """A bound of a loop, known when the kernel runs."""
        return value.handle.data.item()

else:

    @triton.jit
    def bound(value: tl.tensor) -> tl.tensor:
        """A bound of a loop, known when the kernel runs."""
        return value


@triton.jit
def find_tile(
    offsets_ptr: tl.tensor, tile: tl.tensor, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The group of the tile'th run of at most BLOCK pairs, its first place, and the end of the group.

    A tile behind the last one has a group of at least GROUPS, and first = end = 0.
    """
    groups = tl.arange(0, WIDTH)
    start = tl.load(offsets_ptr + groups, mask=groups < GROUPS, other=0)
    end = tl.load(offsets_ptr + groups + 1, mask=groups < GROUPS, other=0)
    tiles = (end - start + BLOCK - 1) // BLOCK
    tiles_end = tl.cumsum(tiles, axis=0)
    group = tl.sum((tiles_end <= tile).to(tl.int32), axis=0)
    mine = groups == group
    first = tl.sum(tl.where(mine, start + (tile - tiles_end + tiles) * BLOCK, 0), axis=0)
    return group, first, tl.sum(tl.where(mine, end, 0), axis=0)


def most_tiles(num_pairs: int, groups: int, block: int) -> int:
    """How many tiles there can be: each group with pairs has at most one that is not full."""
    return (num_pairs + min(groups, num_pairs) * (block - 1)) // block


@triton.jit
def swizzle(program: tl.tensor, tiles: tl.tensor, COLUMNS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(tile, column block) of a program: eight tiles pass over all columns together and share them in the cache."""
    band = program // (8 * COLUMNS)
    height = tl.minimum(tiles - band * 8, 8)
    within = program % (8 * COLUMNS)
    return band * 8 + within % height, within // height


@triton.jit
def operand(x: tl.tensor, ACC: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """An operand of a product. The interpreter computes bfloat16 wrongly, so there it becomes the sum's type."""
    if UPCAST:
        x = x.to(ACC)
    return x


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """To the type of a result, rounded to nearest even; the interpreter would cut float32 off to bfloat16."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def of_group(
    stack_ptr: tl.tensor, shared_ptr: tl.tensor, group: tl.tensor, SIZE: tl.constexpr, LAST: tl.constexpr
) -> tl.tensor:
    """Where the parameters of a group begin; LAST is the shared expert's group, or -1."""
    pointer = stack_ptr + group.to(tl.int64) * SIZE
    if LAST >= 0:
        pointer = tl.where(group == LAST, shared_ptr, pointer)
    return pointer


@triton.jit
def load_gates(
    gates_ptr: tl.tensor,
    shared_gates_ptr: tl.tensor,
    pair: tl.tensor,
    keep: tl.tensor,
    SLOTS: tl.constexpr,
    SHARED: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:
    """The gates of pairs; the last slot of a row is the shared expert's, if there is one."""
    if SHARED:
        row = pair // SLOTS
        slot = pair % SLOTS
        own = keep & (slot < SLOTS - 1)
        gates = tl.load(gates_ptr + row * (SLOTS - 1) + slot, mask=own, other=0.0).to(ACC)
        gates += tl.load(shared_gates_ptr + row, mask=keep & (slot == SLOTS - 1), other=0.0).to(ACC)
    else:
        gates = tl.load(gates_ptr + pair, mask=keep, other=0.0).to(ACC)
    return gates


@triton.jit
def row_product(
    sums: tl.tensor,
    row_ptrs: tl.tensor,
    weight_ptr: tl.tensor,
    columns: tl.tensor,
    DEPTH: tl.constexpr,
    DEPTH_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """sums[m, c] + sum over the depth of row[m, depth] * weight[depth, c]."""
    depth = tl.arange(0, BLOCK_K)
    left_ptrs = row_ptrs[:, None] + depth[None, :]
    right_ptrs = weight_ptr + depth[:, None] * DEPTH_STRIDE + columns[None, :] * COLUMN_STRIDE
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            left = tl.load(left_ptrs)
            right = tl.load(right_ptrs)
        else:
            left = tl.load(left_ptrs, mask=(start + depth < DEPTH)[None, :], other=0.0)
            right = tl.load(right_ptrs, mask=(start + depth < DEPTH)[:, None], other=0.0)
        left = operand(left, ACC, UPCAST)
        right = operand(right, ACC, UPCAST)
        sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=ACC)
        left_ptrs += BLOCK_K
        right_ptrs += BLOCK_K * DEPTH_STRIDE
    return sums


@triton.jit
def wrapped(columns: tl.tensor, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Columns past the last one become others, so that loads need no mask; their results are not stored."""
    if COLUMNS % BLOCK_N != 0:
        columns = columns % COLUMNS
    return columns


@triton.jit
def silu(z: tl.tensor) -> tl.tensor:
    """The number times its sigmoid."""
    return z / (1 + tl.exp(-z))


@triton.jit
def activated(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The activation of one number: "relu", "silu" or "gelu" (by erf)."""
    if ACTIVATION == "relu":
        a = tl.where(z <= 0, 0.0, z)  # a number that is none stays so
    elif ACTIVATION == "silu":
        a = silu(z)
    else:
        a = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    return a


@triton.jit
def slope(z: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """The derivative of `activated`."""
    if ACTIVATION == "relu":
        d = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-z))
        d = s * (1 + z * (1 - s))
    else:
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        d = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    return d
