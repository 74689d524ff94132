"""Triton: one layer's weights with its sorted pairs, and the block sizes of its products.

Shape letters: K experts a row, S slots a row, P pairs, G groups (experts, then the shared one), D model width, F expert
width, U = 2F with "swiglu", else F.
"""

from typing import NamedTuple

import torch
import triton.language as tl

from mole_asr.moe.backends.triton_parts import INTERPRETED, power_of_two
from mole_asr.moe.backends.triton_plan import SortedPairs
from mole_asr.moe.experts import Activation, ExpertWeights


class Blocks(NamedTuple):
    """The block sizes of a product: rows, columns, depth of a step; and warps and pipeline stages of a program."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def meta(self) -> dict[str, int]:
        """As arguments of a kernel."""
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages}


def block_sizes(rows_a_group: int, columns: int, depth: int, dtype: torch.dtype, wide: bool = True) -> Blocks:
    """Blocks for a product of about `rows_a_group` rows an expert; compiled for sm_80 and sm_90, not timed yet.

    A block has no more rows than an expert, or padding would be computed: with 128 rows, 64 experts and 8192 pairs
    that is half of the work. Types without tensor cores get smaller blocks, which fit the registers.

    Args:
        rows_a_group: of the first factor, on average.
        columns: of the second factor.
        depth: of the product.
        dtype: of the factors.
        wide: False where a program holds two sums or much beside them; a block of 128 columns would spill registers.
    """
    largest, step = (128, 64) if dtype.itemsize == 2 else (64, 32)
    rows = max(16, min(largest, power_of_two(rows_a_group + 1) // 2))
    width = max(16, min(largest if wide else 64, power_of_two(columns)))
    warps = 8 if rows * width >= 128 * (128 if wide else 64) else 4
    return Blocks(rows, width, max(16, min(step, power_of_two(depth))), warps, 3)


class Problem(NamedTuple):
    """One layer's weights and the pairs that they are applied to: what all launches share.

    Attributes:
        pairs: the pairs, sorted.
        slots: S.
        stack: the experts' weights in the type of the products (biases in any type).
        shared: those of the shared expert, or None; then S = K + 1.
        activation: of the experts.
    """

    pairs: SortedPairs
    slots: int
    stack: ExpertWeights
    shared: ExpertWeights | None
    activation: Activation

    @property
    def groups(self) -> int:
        """G."""
        return self.stack.w1_FD.shape[0] + (self.shared is not None)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the products."""
        return self.stack.w1_FD.dtype

    @property
    def d_model(self) -> int:
        """D."""
        return self.stack.w2_DF.shape[1]

    @property
    def d_ff(self) -> int:
        """F."""
        return self.stack.w2_DF.shape[2]

    @property
    def up_width(self) -> int:
        """U."""
        return self.stack.w1_FD.shape[1]

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.pairs.pair_P.numel()

    @property
    def accumulator(self) -> tl.dtype:
        """The type that products are summed in."""
        return tl.float64 if self.dtype == torch.float64 else tl.float32

    @property
    def sum_dtype(self) -> torch.dtype:
        """The same, as torch calls it."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def blocks(self, columns: int, depth: int, wide: bool = True) -> Blocks:
        """Block sizes of a product of this problem's rows; see `block_sizes`."""
        return block_sizes(self.num_pairs // self.groups, columns, depth, self.dtype, wide)

    def meta(self) -> dict[str, object]:
        """What every product's kernel must know about this problem when it is compiled."""
        return {
            "SLOTS": self.slots,
            "GROUPS": self.groups,
            "WIDTH": power_of_two(self.groups + 1),
            "SHARED": self.shared is not None,
            "ACC": self.accumulator,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "UPCAST": INTERPRETED,
        }
