"""A trained dense feed-forward layer becomes a mixture of experts: cut into slices, or copied."""

from mole_asr.moe.convert.slices import contiguous_groups, slice_dense
from mole_asr.moe.convert.upcycle import fill_experts, upcycle_dense

__all__ = ["contiguous_groups", "fill_experts", "slice_dense", "upcycle_dense"]
