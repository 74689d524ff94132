"""Plan + rows + experts -> rows.

Shape letters: N rows, D model width.
"""

from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from mole_asr.moe.backends import cpu_tiled, grouped_mm, reference, segment
from mole_asr.moe.experts import Activation, Experts, compute_dtype
from mole_asr.moe.plan import Layout, RoutingPlan

Backend = Literal["auto", "reference", "cpu_tiled", "segment", "grouped_mm", "triton"]

_NAMES = get_args(Backend)
_RUN = {
    "reference": reference.run,
    "cpu_tiled": cpu_tiled.run,
    "segment": segment.run,
    "grouped_mm": grouped_mm.run,
}
_HAS_TRITON = find_spec("triton") is not None
TRITON_ACTIVATIONS = ("relu", "silu", "gelu", "swiglu")


def choose_backend(
    device_type: str,
    dtype: torch.dtype,
    layout: Layout,
    widths: tuple[int, ...] = (),
    activation: Activation = "relu",
) -> Backend:
    """The fastest backend that computes such a plan.

    torch's grouped_mm is the choice where a GPU has no Triton (as on Windows): it never waits for the device there.
    On a CPU tiles are faster (`mole-asr bench moe`).

    Args:
        device_type: of the rows.
        dtype: of the products (autocast's, where it is on).
        layout: of the plan.
        widths: D and F of the experts; grouped_mm does not take all.
        activation: of the experts; the Triton kernels know some.
    """
    if device_type == "cpu":
        return "segment" if layout == "segment" else "cpu_tiled"
    if device_type == "cuda" and dtype != torch.float64 and _HAS_TRITON and activation in TRITON_ACTIVATIONS:
        return "triton"
    if layout == "segment":
        return "segment"
    return "grouped_mm" if device_type == "cuda" and grouped_mm.takes(dtype, widths) else "reference"


def dispatch(x_ND: Tensor, plan: RoutingPlan, experts: Experts, backend: Backend = "auto") -> Tensor:
    """Compute y[n] = sum over slots k of gate[n, k] * expert[n, k](x[n]) + shared_gate[n] * shared(x[n]).

    Slots without an expert are left out by index, never multiplied by zero. Under autocast the products run in its
    type with float32 master weights; gates and sums stay float32.

    Args:
        x_ND: rows; no padding among them.
        plan: which expert computes which row.
        experts: the parameters.
        backend: "auto", or the name of one backend; all give the same answer.

    Returns:
        y_ND in the type of x; rows without any expert are zero.

    Raises:
        ValueError: rows, plan and experts do not fit together, or the backend is unknown or cannot compute the plan.
    """
    _check(x_ND, plan, experts)
    if backend not in _NAMES:
        raise ValueError(f"backend must be one of {', '.join(_NAMES)}, not {backend!r}")
    if hasattr(experts.w1_EFD, "device_mesh"):  # spread over ranks
        from mole_asr.moe.parallel import dispatch_parallel  # late: its import is slow

        return dispatch_parallel(x_ND, plan, experts, backend)
    if backend == "auto":
        widths = (experts.d_model, experts.d_ff)
        backend = choose_backend(x_ND.device.type, compute_dtype(x_ND), plan.layout, widths, experts.activation)
    if backend == "segment" and plan.layout != "segment":
        raise ValueError("the backend 'segment' needs a plan in the layout 'segment'; use 'auto'")
    if backend == "triton":
        if experts.activation not in TRITON_ACTIVATIONS:
            raise ValueError(f"the backend 'triton' does not know the activation {experts.activation!r}; use 'auto'")
        from mole_asr.moe.backends import triton  # late: its import is slow, and it may be missing

        return triton.run(x_ND, plan, experts)
    return _RUN[backend](x_ND, plan, experts)


def _check(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> None:
    if x_ND.dim() != 2 or x_ND.shape[1] != experts.d_model:
        raise ValueError(f"rows must be [N, {experts.d_model}] for these experts, not {tuple(x_ND.shape)}")
    if plan.layout == "token" and plan.num_units != x_ND.shape[0]:
        raise ValueError(f"the plan is for {plan.num_units} rows, not {x_ND.shape[0]}")
    # Elsewhere the numbers would have to be waited for; a compiler does not know them.
    known = plan.layout == "segment" and x_ND.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and plan.bounds[-1] != x_ND.shape[0]:
        raise ValueError(f"the plan's segments hold {plan.bounds[-1]} rows, not {x_ND.shape[0]}")
    if plan.num_experts != experts.num_experts:
        raise ValueError(f"the plan is for {plan.num_experts} experts, not {experts.num_experts}")
    if plan.shared_gates is not None and not experts.shared:
        raise ValueError("the plan weighs a shared expert, but these experts have none: build them with shared=True")
    if x_ND.dtype != experts.w1_EFD.dtype and not torch.is_autocast_enabled(x_ND.device.type):
        raise ValueError(f"rows are {x_ND.dtype} and experts {experts.w1_EFD.dtype}: use one type or autocast")
