"""A trained dense feed-forward layer becomes a mixture of experts: cut into slices, or copied."""

from mole_asr.moe.convert.sliced import SliceConfig, SlicedFeedForward, SlicedLayer
from mole_asr.moe.convert.slices import contiguous_groups, slice_dense
from mole_asr.moe.convert.splits import make_groups
from mole_asr.moe.convert.upcycle import fill_experts, upcycle_dense

__all__ = [
    "SliceConfig",
    "SlicedFeedForward",
    "SlicedLayer",
    "contiguous_groups",
    "fill_experts",
    "make_groups",
    "slice_dense",
    "upcycle_dense",
]
