"""Depthwise convolution over time.

Letters: B batch, T frames, D channels, K kernel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _ShiftedProducts(torch.autograd.Function):
    """Sum over the kernel of (input shifted by k) x (weight k), each added in place."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_KD: Tensor) -> Tensor:
        T, padding = x_BTD.shape[1], weight_KD.shape[0] // 2
        padded_BTD = functional.pad(x_BTD, (0, 0, padding, padding))
        ctx.save_for_backward(padded_BTD, weight_KD)
        y_BTD = padded_BTD[:, :T] * weight_KD[0]
        for k in range(1, weight_KD.shape[0]):
            y_BTD.addcmul_(padded_BTD[:, k : k + T], weight_KD[k])
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient_BTD,) = gradients
        padded_BTD, weight_KD = ctx.saved_tensors
        T = gradient_BTD.shape[1]
        taps = [padded_BTD[:, k : k + T] for k in range(weight_KD.shape[0])]
        weight_gradient_KD = torch.stack([torch.linalg.vecdot(tap, gradient_BTD, dim=1).sum(0) for tap in taps])
        # The gradient of a correlation is the correlation with the reversed kernel.
        return _ShiftedProducts.apply(gradient_BTD, weight_KD.flip(0)), weight_gradient_KD


def depthwise_convolution(x_BTD: Tensor, weight_KD: Tensor) -> Tensor:
    """Convolves each channel over time with its own kernel; zeros stand beyond both ends.

    On a CPU written as shifted sums in float32: as fast as oneDNN's kernel for channels-last images, and without that
    kernel's compilation, which for some shapes takes minutes on AVX-512 bf16 machines (oneDNN in torch 2.11).

    Args:
        x_BTD: any floating type.
        weight_KD: K odd.

    Returns:
        y_BTD; float32 on a CPU under autocast.
    """
    if x_BTD.device.type == "cpu":
        return _ShiftedProducts.apply(x_BTD.to(weight_KD.dtype), weight_KD)
    K, D = weight_KD.shape
    return functional.conv1d(x_BTD.mT, weight_KD.t()[:, None].to(x_BTD.dtype), padding=K // 2, groups=D).mT
