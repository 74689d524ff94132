"""Conformer blocks (Gulati et al., 2020), built for few and large operations.

Letters: B batch, T frames, D model width, H heads, C width of a head (D / H), F feed-forward width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.attention import MASKED, SelfAttention
from mole_asr.asr.depthwise import depthwise_convolution
from mole_asr.asr.mixture import Decision, MixtureFeedForward, PaddedFrames
from mole_asr.moe.experts import compute_dtype


@dataclass(frozen=True)
class Frames(PaddedFrames):
    """What all blocks need to know of a padded batch, worked out once.

    Attributes:
        bias_GTT: attention bias, G = B x H: minus slope x distance, and MASKED at padded keys.
    """

    bias_GTT: Tensor

    @classmethod
    def of(cls, lengths_B: Tensor, size: int, num_heads: int) -> "Frames":
        """Describes a batch of utterances padded to `size` frames."""
        padded = PaddedFrames.of_lengths(lengths_B, size)
        return cls(lengths_B, padded.valid_BT, padded.rows, attention_bias(padded.valid_BT, num_heads))


def attention_bias(valid_BT: Tensor, num_heads: int) -> Tensor:
    """Symmetric linear biases (ALiBi, Press et al., 2022): head h is drawn to near frames by slope 2^(-8 (h + 1) / H).

    Relative position comes at the price of nothing: the bias is added inside the product of queries and keys, and all
    blocks share it. Which side a frame is on, the convolution of the block tells.

    Returns:
        bias_GTT, G = B x H, in the type that matrix products have here (bfloat16 under its autocast).
    """
    B, T = valid_BT.shape
    device = valid_BT.device
    position_T = torch.arange(T, device=device, dtype=torch.float32)
    slope_H = 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=device) / num_heads)
    bias_HTT = -slope_H[:, None, None] * (position_T[:, None] - position_T[None, :]).abs()
    bias_BHTT = bias_HTT[None].expand(B, -1, -1, -1).masked_fill(~valid_BT[:, None, None, :], MASKED)
    return bias_BHTT.to(compute_dtype(bias_BHTT)).reshape(B * num_heads, T, T)


class UtteranceDropout(nn.Dropout1d):
    """Drops the same channels in all frames of an utterance: as good a regulariser, and no random number a frame."""

    def forward(self, input: Tensor) -> Tensor:
        """Drops channels of [B, T, D]."""
        return super().forward(input.transpose(1, 2)).transpose(1, 2) if self.training and self.p > 0 else input


class FeedForward(nn.Sequential):
    """LayerNorm, then D -> F -> D with SiLU."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__(nn.LayerNorm(d_model), nn.Linear(d_model, d_ff), nn.SiLU(), nn.Linear(d_ff, d_model))


class Convolution(nn.Module):
    """LayerNorm, gated pointwise convolution, depthwise convolution over time, pointwise convolution.

    LayerNorm stands in for the paper's BatchNorm: it does not depend on the batch, nor on padding.
    """

    def __init__(self, d_model: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.gated = nn.Linear(d_model, 2 * d_model)
        bound = kernel_size**-0.5  # as nn.Conv1d with one input channel a group
        self.depthwise_KD = nn.Parameter(torch.empty(kernel_size, d_model).uniform_(-bound, bound))
        self.depthwise_norm = nn.LayerNorm(d_model)
        self.pointwise = nn.Linear(d_model, d_model)

    def forward(self, x_BTD: Tensor, frames: Frames) -> Tensor:
        """Convolves over time; padding counts as zero."""
        gated_BTD = functional.glu(self.gated(self.norm(x_BTD)), dim=-1) * frames.valid_BT[:, :, None]
        deep_BTD = depthwise_convolution(gated_BTD, self.depthwise_KD)
        return self.pointwise(functional.silu(self.depthwise_norm(deep_BTD)))


class ConformerBlock(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward (dense, or of experts), LayerNorm.

    Args:
        d_model: D.
        d_ff: F.
        num_heads: H.
        kernel_size: of the depthwise convolution, odd.
        dropout: of each part's output.
        feed_forward_out: the second feed-forward part; None: dense, of width F.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_heads: int,
        kernel_size: int,
        dropout: float,
        feed_forward_out: FeedForward | MixtureFeedForward | None = None,
    ) -> None:
        super().__init__()
        self.feed_forward_in = FeedForward(d_model, d_ff)
        self.attention = SelfAttention(d_model, num_heads)
        self.convolution = Convolution(d_model, kernel_size)
        self.feed_forward_out = FeedForward(d_model, d_ff) if feed_forward_out is None else feed_forward_out
        self.norm = nn.LayerNorm(d_model)
        self.dropout = UtteranceDropout(dropout)

    def forward(self, x_BTD: Tensor, frames: Frames, decision: Decision | None) -> Tensor:
        """Transforms x_BTD; `decision` is needed by a mixture of experts only."""
        x_BTD = x_BTD + 0.5 * self.dropout(self.feed_forward_in(x_BTD))
        x_BTD = x_BTD + self.dropout(self.attention(x_BTD, frames.bias_GTT))
        x_BTD = x_BTD + self.dropout(self.convolution(x_BTD, frames))
        if isinstance(self.feed_forward_out, MixtureFeedForward):
            assert decision is not None, "a MoLE block stands before the language tokenizer"
            y_BTD = self.feed_forward_out(x_BTD, frames, decision)
        else:
            y_BTD = self.feed_forward_out(x_BTD)
        return self.norm(x_BTD + 0.5 * self.dropout(y_BTD))
