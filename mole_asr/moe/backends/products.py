"""The matrix products of the CPU backends.

oneDNN's fused linear layer adds the bias and applies the activation while a block of the result is still in the
cache; in float32 it is also the faster product (AMD Zen 4, one thread: 100-108 GFLOP/s, MKL 85-92). Where torch was
built without it, and for types it does not know, the plain operations do the same.

Shape letters: n rows of a tile, I inputs, O outputs.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.moe.experts import Activation, activate

_FUSED = {None: "none", "relu": "relu", "silu": "swish", "gelu": "gelu"}  # oneDNN's names; it has none of `GATED`


def linear(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None, activation: Activation | None = None) -> Tensor:
    """activation(x W^T + b), outside autograd; one of `GATED` gives half the width. x has at least one row."""
    if _has_fused(x_nI.device.type, x_nI.dtype):
        if activation in _FUSED:
            return _fused(x_nI, w_OI, b_O, _FUSED[activation])
        z_nO = _fused(x_nI, w_OI, b_O, "none")
    else:
        z_nO = functional.linear(x_nI, w_OI, b_O)
    return z_nO if activation is None else activate(z_nO, activation)


def pack(w_OI: Tensor, rows: int) -> Tensor:
    """The weight in the layout that `linear` reads fastest; pays from the second tile of about so many rows on."""
    fused = _has_fused(w_OI.device.type, w_OI.dtype)
    return torch.ops.mkldnn._reorder_linear_weight(w_OI.detach(), rows) if fused else w_OI


def matmul(x_nI: Tensor, w_IO: Tensor) -> Tensor:
    """X W, outside autograd. x has at least one row."""
    if x_nI.dtype == torch.float32 and _has_fused(x_nI.device.type, x_nI.dtype):
        return _fused(x_nI, w_IO.t(), None, "none")
    return x_nI @ w_IO


def _fused(x_nI: Tensor, w_OI: Tensor, b_O: Tensor | None, activation: str) -> Tensor:
    """The operation that torch's own compiler makes of a linear layer on a CPU."""
    algorithm = "none" if activation == "gelu" else ""  # GELU by erf, not by tanh
    return torch.ops.mkldnn._linear_pointwise(x_nI, w_OI, b_O, activation, [], algorithm)


@cache
def _has_fused(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the fused layer computes this type here; tried once, because builds and CPUs differ."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    one = torch.ones(1, 1, dtype=dtype)
    try:
        return _fused(one, one, one[0], "relu").item() == 2
    except (AttributeError, RuntimeError):
        return False
