"""Liger-Kernel's fused MoE on the CPU: `python liger_under_interpreter.py CASES.pt RESULTS.pt`.

A process of its own, because Triton's interpreter is chosen (TRITON_INTERPRET=1) when kernels are defined, for good.
"""

import os
import sys
from typing import Any

import torch


def let_loops_end_at_tensors() -> None:
    """Triton 3.6's interpreter takes `int` of arrays of one element, which numpy >= 2.4 refuses unless asked so."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def main(cases_file: str, results_file: str) -> None:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    results = []
    for case in torch.load(cases_file):
        inputs = [case[name].requires_grad_() for name in ("x_ND", "w1_EFD", "w2_EDF", "gates_NK")]
        x_ND, w1_EFD, w2_EDF, gates_NK = inputs
        y_ND = LigerFusedMoEFunction.apply(x_ND, w1_EFD, w2_EDF, case["ids_NK"], gates_NK)
        results.append([y_ND.detach(), *torch.autograd.grad(y_ND, inputs, case["dy_ND"])])
    torch.save(results, results_file)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"  # the interpreter cannot time kernels
    torch.set_num_threads(1)
    let_loops_end_at_tensors()
    main(*sys.argv[1:])
