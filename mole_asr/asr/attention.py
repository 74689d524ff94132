"""What the attention layers share. Written out: scaled_dot_product_attention with a mask is five times slower on CPUs.

Letters: B batch, T frames, U queries, D model width, H heads, G = B x H, W width of a head (D / H).
"""

import torch
from torch import Tensor, nn

from mole_asr.moe.experts import compute_dtype

MASKED = -1e4  # finite, so that a row of padding has no NaN; exp(MASKED) is 0 in bfloat16 too


def key_mask_bias(valid_BT: Tensor, num_heads: int) -> Tensor:
    """MASKED at padded keys, else 0: [G, 1, T], in the type that matrix products have here."""
    bias_BT = torch.zeros_like(valid_BT, dtype=torch.float32).masked_fill_(~valid_BT, MASKED)
    return bias_BT.to(compute_dtype(bias_BT)).repeat_interleave(num_heads, dim=0)[:, None]


def attend(query_GUW: Tensor, key_GTW: Tensor, value_GTW: Tensor, bias_GUT: Tensor) -> Tensor:
    """Attention of U queries over T keys."""
    score_GUT = torch.baddbmm(bias_GUT, query_GUW, key_GTW.transpose(1, 2), alpha=query_GUW.shape[2] ** -0.5)
    return torch.bmm(score_GUT.softmax(-1), value_GTW)


def split_heads(x_BTD: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Cuts [B, T, parts x D] into `parts` tensors [G, T, W]."""
    B, T, _ = x_BTD.shape
    return x_BTD.view(B, T, parts, num_heads, -1).permute(2, 0, 3, 1, 4).reshape(parts, B * num_heads, T, -1).unbind(0)


def merge_heads(x_GTW: Tensor, num_heads: int) -> Tensor:
    """[G, T, W] to [B, T, D]."""
    G, T, W = x_GTW.shape
    return x_GTW.view(G // num_heads, num_heads, T, W).transpose(1, 2).reshape(G // num_heads, T, num_heads * W)


class SelfAttention(nn.Module):
    """LayerNorm, then multi-head self-attention.

    Whisper's keys have no bias. Ours do, and it changes nothing: it adds the same number to all scores of a query.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.output = nn.Linear(d_model, d_model)

    def forward(self, x_BTD: Tensor, bias_GTT: Tensor) -> Tensor:
        """Attends over all frames, with a bias ([G, 1, T] or [G, T, T]) on the scores."""
        query_GTW, key_GTW, value_GTW = split_heads(self.query_key_value(self.norm(x_BTD)), 3, self.num_heads)
        return self.output(merge_heads(attend(query_GTW, key_GTW, value_GTW, bias_GTT), self.num_heads))
