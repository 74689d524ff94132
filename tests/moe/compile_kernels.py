"""Compile every kernel of a forward and backward pass for a GPU that need not be there; print the kernels' names.

python compile_kernels.py <dtype> <compute capability>: run by test_triton_operators.py, without Triton's interpreter.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mole_asr.moe import Experts
from mole_asr.moe.backends import triton as backend

DTYPE = getattr(torch, sys.argv[1])
TARGET = GPUTarget("cuda", int(sys.argv[2]), 32)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
    """Instead of a launch."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip((p.name for p in self.params), args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(self.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    assert not values, f"{self.__name__} has no {list(values)}"
    compiled = triton.compile(ASTSource(self, signature, constants, attributes), target=TARGET, options=options)
    assert compiled.asm["cubin"]
    print(self.__name__)


def main() -> None:
    """Small sizes: a block of 16 rows compiles in a second."""
    rows, top_k, width = 64, 2, 32
    experts = Experts(3, width, width, "swiglu", shared=True).to(DTYPE).requires_grad_(False)
    weights = [*experts.stack(), *experts.shared_weights()]
    x_ND, gates, shared_gates = torch.randn(rows, width, dtype=DTYPE), torch.randn(rows, top_k), torch.randn(rows)
    pairs = list(backend.sort_pairs(torch.zeros(rows, top_k, dtype=torch.int32), 3, True))
    forward = (x_ND, gates, shared_gates, weights, x_ND, weights, pairs, "swiglu", True)
    y_ND, z_PU = torch.ops.mole.experts_forward(*forward)
    backward = (y_ND, gates, shared_gates, x_ND, weights, pairs, z_PU, "swiglu", DTYPE, DTYPE, True, True)
    torch.ops.mole.experts_backward(*backward)


if __name__ == "__main__":
    JITFunction.run = compile_only
    main()
