"""What the attention layers share. Written out: scaled_dot_product_attention with a mask is five times slower on CPUs.

Letters: B batch, T frames, U queries, D model width, H heads, G = B x H, W width of a head (D / H).
"""

import torch
from torch import Tensor

MASKED = -1e4  # finite, so that a row of padding has no NaN; exp(MASKED) is 0 in bfloat16 too


def key_mask_bias(valid_BT: Tensor, num_heads: int) -> Tensor:
    """MASKED at padded keys, else 0: [G, 1, T], in the type that matrix products have here."""
    bias_BT = torch.zeros_like(valid_BT, dtype=torch.float32).masked_fill_(~valid_BT, MASKED)
    if torch.is_autocast_enabled(valid_BT.device.type):
        bias_BT = bias_BT.to(torch.get_autocast_dtype(valid_BT.device.type))
    return bias_BT.repeat_interleave(num_heads, dim=0)[:, None]


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
