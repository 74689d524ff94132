"""Valid rows of a padded batch, packed one after another.

Shape letters: B utterances, T frames, D features, N valid rows of the whole batch.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Where the valid rows of a padded batch lie. Build it once a forward and share it between layers.

    Attributes:
        lengths_B: valid frames of each utterance.
        num_frames: T, frames of the padded batch.
        index_N: position of each valid row in the flattened [B * T] batch, or None where nothing is padded.
        segments_B1: int64, row offsets of the utterances among the packed rows; the last one is N.
    """

    lengths_B: Tensor
    num_frames: int
    index_N: Tensor | None = field(repr=False)
    segments_B1: Tensor = field(repr=False)

    @classmethod
    def from_lengths(cls, lengths_B: Tensor, num_frames: int) -> "PackedRows":
        """Find the valid rows. On a GPU this waits for the device once, to learn how many they are.

        Args:
            lengths_B: valid frames of each utterance, integers.
            num_frames: T, frames of the padded batch.

        Raises:
            ValueError: the lengths are not a vector of integers.
        """
        if lengths_B.dim() != 1 or lengths_B.is_floating_point():
            raise ValueError(f"lengths_B must be a vector of integers, not {lengths_B.dtype} {tuple(lengths_B.shape)}")
        # A frame past the end of the batch does not exist: longer lengths are cut to the batch.
        lengths_B = lengths_B.clamp(0, num_frames).long()
        segments_B1 = torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0))
        valid_BT = torch.arange(num_frames, device=lengths_B.device) < lengths_B[:, None]
        index_N = valid_BT.flatten().nonzero().squeeze(1)
        nothing_padded = index_N.numel() == valid_BT.numel()
        return cls(lengths_B, num_frames, None if nothing_padded else index_N, segments_B1)

    @property
    def num_rows(self) -> int:
        """N, the number of valid rows."""
        return self.lengths_B.numel() * self.num_frames if self.index_N is None else self.index_N.numel()

    @cached_property
    def utterance_of_row(self) -> Tensor:
        """The utterance (int64) that each packed row belongs to."""
        utterances_B = torch.arange(self.lengths_B.numel(), device=self.lengths_B.device)
        return utterances_B.repeat_interleave(self.lengths_B, output_size=self.num_rows)

    def pack(self, x_BTD: Tensor) -> Tensor:
        """Take the valid rows of a [B, T, ...] tensor: [N, ...]. A view where nothing is padded.

        Raises:
            ValueError: the batch has not the shape that this packing was made for.
        """
        if x_BTD.shape[:2] != (self.lengths_B.numel(), self.num_frames):
            expected = (self.lengths_B.numel(), self.num_frames)
            raise ValueError(f"the packing was made for a batch of {expected}, not {tuple(x_BTD.shape[:2])}")
        flat = x_BTD.reshape(-1, *x_BTD.shape[2:])
        return flat if self.index_N is None else flat.index_select(0, self.index_N)

    def unpack(self, y_ND: Tensor) -> Tensor:
        """Put packed rows back into a [B, T, ...] batch; padding is zero."""
        shape = (self.lengths_B.numel(), self.num_frames, *y_ND.shape[1:])
        if self.index_N is None:
            return y_ND.reshape(shape)
        flat = y_ND.new_zeros(shape[0] * shape[1], *shape[2:])
        return flat.index_copy(0, self.index_N, y_ND).reshape(shape)
