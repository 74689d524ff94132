"""Our backends against Liger-Kernel's fused MoE (Triton), which Triton's interpreter runs on the CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mole_asr.moe import Experts, RoutingPlan, dispatch

if find_spec("liger_kernel") is None or find_spec("triton") is None:
    pytest.skip("liger-kernel or triton is missing: pip install mole-asr[dev]", allow_module_level=True)

SCRIPT = Path(__file__).with_name("liger_under_interpreter.py")
NAMES = ("y_ND", "x_ND", "w1_EFD", "w2_EDF", "gates_NK")


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


def ours(case: dict[str, Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    num_experts, d_model, d_ff = case["w2_EDF"].shape
    experts = Experts(num_experts, d_model, d_ff, "swiglu", bias=False).to(dtype)
    with torch.no_grad():
        experts.w1_EFD.copy_(case["w1_EFD"])
        experts.w2_EDF.copy_(case["w2_EDF"])
    x_ND, gates_NK = (case[name].detach().to(dtype).requires_grad_() for name in ("x_ND", "gates_NK"))
    y_ND = dispatch(x_ND, RoutingPlan(case["ids_NK"], gates_NK, num_experts), experts, backend)
    inputs = [x_ND, experts.w1_EFD, experts.w2_EDF, gates_NK]
    return [y_ND.detach(), *torch.autograd.grad(y_ND, inputs, case["dy_ND"].to(dtype))]


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    # More rows than Liger's tile of 64; widths that no tile divides; three slots, which Liger pads to four.
    return [make_case(70, 5, 2, 24, 20), make_case(9, 6, 3, 40, 72)]


@pytest.fixture(scope="module")
def theirs(cases: list[dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> list[list[Tensor]]:
    folder = tmp_path_factory.mktemp("liger")
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, str(SCRIPT), str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("reference", torch.float32), ("cpu_tiled", torch.float32)],
)
def test_liger_agrees(
    cases: list[dict[str, Tensor]], theirs: list[list[Tensor]], backend: str, dtype: torch.dtype
) -> None:
    for case, results in zip(cases, theirs, strict=True):
        for name, found, expected in zip(NAMES, ours(case, backend, dtype), results, strict=True):
            error = float((found - expected).norm() / expected.norm())
            assert error < 2e-6, f"{name} differs by {error:.1e}"
        assert torch.count_nonzero(results[2][1]) == 0  # the expert without rows
