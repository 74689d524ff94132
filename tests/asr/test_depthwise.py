import pytest
import torch
from torch.nn import functional

from mole_asr.asr.depthwise import depthwise_convolution

# (frames, kernel): odd and even lengths, one frame, kernels as long as and longer than the utterance.
SIZES = [(12, 5), (13, 5), (1, 7), (2, 7), (7, 7), (8, 15), (5, 1)]


def tensors(frames: int, kernel: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(frames * 100 + kernel)
    x_BTD = torch.randn(2, frames, 3, dtype=dtype, generator=generator)
    weight_KD = torch.randn(kernel, 3, dtype=dtype, generator=generator)
    return x_BTD.requires_grad_(), weight_KD.requires_grad_()


def expected(x_BTD: torch.Tensor, weight_KD: torch.Tensor) -> torch.Tensor:
    K, D = weight_KD.shape
    return functional.conv1d(x_BTD.mT, weight_KD.t()[:, None], padding=K // 2, groups=D).mT


@pytest.mark.parametrize(("frames", "kernel"), SIZES)
def test_equals_conv1d_in_values_and_gradients(frames: int, kernel: int) -> None:
    ours, theirs = tensors(frames, kernel), tensors(frames, kernel)
    y_BTD, wanted_BTD = depthwise_convolution(*ours), expected(*theirs)
    torch.testing.assert_close(y_BTD, wanted_BTD)
    upstream_BTD = torch.randn(y_BTD.shape, dtype=y_BTD.dtype, generator=torch.Generator().manual_seed(0))
    y_BTD.backward(upstream_BTD)
    wanted_BTD.backward(upstream_BTD)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize(("frames", "kernel"), [(6, 3), (2, 5)])
def test_gradients_are_those_of_finite_differences(frames: int, kernel: int) -> None:
    assert torch.autograd.gradcheck(depthwise_convolution, tensors(frames, kernel))


def test_takes_views_and_bfloat16_and_answers_in_the_type_of_the_weights() -> None:
    x_BTD, weight_KD = tensors(9, 3, torch.float32)
    view_BTD = x_BTD.detach().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(depthwise_convolution(view_BTD, weight_KD), expected(x_BTD, weight_KD))
    half_BTD = x_BTD.detach().bfloat16().requires_grad_()
    y_BTD = depthwise_convolution(half_BTD, weight_KD)
    assert y_BTD.dtype == torch.float32
    torch.testing.assert_close(y_BTD, expected(half_BTD.float(), weight_KD))
    y_BTD.sum().backward()
    assert half_BTD.grad is not None and half_BTD.grad.dtype == torch.bfloat16
