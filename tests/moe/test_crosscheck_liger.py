"""Our backends against Liger-Kernel's fused MoE, which is written in Triton.

Triton decides when it is imported whether its interpreter runs the kernels (TRITON_INTERPRET=1). So this file, run as
a program, is the process that computes Liger's results and our Triton backend's:
`python test_crosscheck_liger.py DEVICE CASES.pt RESULTS.pt`.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mole_asr.moe import Experts, RoutingPlan, dispatch

NAMES = ("y_ND", "x_ND", "w1_EFD", "w2_EDF", "gates_NK")
pytestmark = pytest.mark.skipif(
    find_spec("liger_kernel") is None or find_spec("triton") is None,
    reason="liger-kernel or triton is missing: pip install mole-asr[dev]",
)


def make_case(rows: int, num_experts: int, top_k: int, d_model: int, d_ff: int) -> dict[str, Tensor]:
    """Expert 1 has no rows; expert 0 has every row in one of its slots."""
    others = torch.rand(rows, num_experts - 2).argsort(-1)[:, : top_k - 1] + 2
    ids_NK = torch.cat([torch.zeros(rows, 1, dtype=torch.long), others], 1)
    order_NK = torch.rand(rows, top_k).argsort(-1)
    return {
        "x_ND": torch.randn(rows, d_model),
        "w1_EFD": torch.randn(num_experts, 2 * d_ff, d_model) / d_model**0.5,
        "w2_EDF": torch.randn(num_experts, d_model, d_ff) / d_ff**0.5,
        "ids_NK": ids_NK.gather(1, order_NK).int(),
        "gates_NK": torch.randn(rows, top_k),
        "dy_ND": torch.randn(rows, d_model),
    }


def run_ours(case: dict[str, Tensor], backend: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The output and all gradients, in the order of NAMES."""
    num_experts, d_model, d_ff = case["w2_EDF"].shape
    experts = Experts(num_experts, d_model, d_ff, "swiglu", bias=False).to(case["x_ND"].device, dtype)
    with torch.no_grad():
        experts.w1_EFD.copy_(case["w1_EFD"])
        experts.w2_EDF.copy_(case["w2_EDF"])
    x_ND, gates_NK = (case[name].detach().to(dtype).requires_grad_() for name in ("x_ND", "gates_NK"))
    y_ND = dispatch(x_ND, RoutingPlan(case["ids_NK"], gates_NK, num_experts), experts, backend)
    inputs = [x_ND, experts.w1_EFD, experts.w2_EDF, gates_NK]
    return [y_ND.detach(), *torch.autograd.grad(y_ND, inputs, case["dy_ND"].to(dtype))]


def run_liger(case: dict[str, Tensor]) -> list[Tensor]:
    """The same by Liger."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    inputs = [case[name].requires_grad_() for name in ("x_ND", "w1_EFD", "w2_EDF", "gates_NK")]
    x_ND, w1_EFD, w2_EDF, gates_NK = inputs
    y_ND = LigerFusedMoEFunction.apply(x_ND, w1_EFD, w2_EDF, case["ids_NK"], gates_NK)
    return [y_ND.detach(), *torch.autograd.grad(y_ND, inputs, case["dy_ND"])]


def let_loops_end_at_tensors() -> None:
    """Triton 3.6's interpreter takes `int` of arrays of one element, which numpy 2.4 refuses. Liger has such loops."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def main(device: str, cases_file: str, results_file: str) -> None:
    torch.set_num_threads(1)
    cases = [{name: tensor.to(device) for name, tensor in case.items()} for case in torch.load(cases_file)]
    results = {"triton": [run_ours(case, "triton") for case in cases]}
    if device == "cpu":
        let_loops_end_at_tensors()
    results["liger"] = [run_liger(case) for case in cases]
    torch.save(results, results_file)


def run_main(device: str, cases: list[dict[str, Tensor]], folder: Path) -> dict[str, list[list[Tensor]]]:
    """`main` in a process of its own, with one configuration of Liger's kernels: the interpreter can time none."""
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, __file__, device, str(folder / "cases.pt"), str(folder / "results.pt")]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(device == "cpu")), "LIGER_FUSED_MOE_AUTOTUNE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt", map_location="cpu")


def assert_agree(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for name, mine, their in zip(NAMES, found, expected, strict=True):
        error = float((mine - their).norm() / their.norm())
        assert error < bound, f"{name} differs by {error:.1e}"


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    # More rows than Liger's tile of 64; widths that no tile divides; three slots, which Liger pads to four.
    return [make_case(70, 5, 2, 24, 20), make_case(9, 6, 3, 40, 72)]


@pytest.fixture(scope="module")
def interpreted(
    cases: list[dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[Tensor]]]:
    return run_main("cpu", cases, tmp_path_factory.mktemp("liger"))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("reference", torch.float32),
        ("cpu_tiled", torch.float32),
        ("grouped_mm", torch.float32),
    ],
)
def test_liger_agrees(
    cases: list[dict[str, Tensor]], interpreted: dict[str, list[list[Tensor]]], backend: str, dtype: torch.dtype
) -> None:
    for case, theirs in zip(cases, interpreted["liger"], strict=True):
        assert_agree(run_ours(case, backend, dtype), theirs, 2e-6)
        assert torch.count_nonzero(theirs[2][1]) == 0  # the expert without rows


def test_liger_agrees_with_our_triton_backend(interpreted: dict[str, list[list[Tensor]]]) -> None:
    for ours, theirs in zip(interpreted["triton"], interpreted["liger"], strict=True):
        assert_agree(ours, theirs, 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_agrees_on_a_gpu(cases: list[dict[str, Tensor]], tmp_path: Path) -> None:
    results = run_main("cuda", cases, tmp_path)
    for ours, theirs in zip(results["triton"], results["liger"], strict=True):
        assert_agree(ours, theirs, 5e-3)  # Liger's products of float32 are TF32


if __name__ == "__main__":
    main(*sys.argv[1:])
