"""Who computes a problem: our backends, and what they are compared with.

Shape letters: N rows, K experts a row, E experts, D model width, F expert width.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mole_asr.bench.cases import Case, Problem
from mole_asr.moe.backends import grouped_mm
from mole_asr.moe.dispatch import TRITON_ACTIVATIONS, Backend, dispatch
from mole_asr.moe.experts import ExpertWeights, activate, feed_forward

Run = Callable[[Problem], Tensor]

BACKENDS: tuple[Backend, ...] = ("reference", "cpu_tiled", "segment", "grouped_mm", "triton")
OTHERS = ("grouped_mm_compiled", "transformers", "liger")
NAMES = (*BACKENDS, *OTHERS)
DENSE = ("dense", "dense_tiled")


def dense_variants() -> dict[str, Run]:
    """The dense layers of `make_dense`: plain, and by the backend that dispatch chooses, so with tiles on a CPU."""
    return {"dense": _dense, "dense_tiled": partial(_dispatch, "auto")}


def variants(case: Case, problem: Problem, names: tuple[str, ...]) -> dict[str, Run]:
    """Those of `names` that can compute the case here."""
    found: dict[str, Run] = {name: partial(_dispatch, name) for name in BACKENDS}
    found |= {"grouped_mm_compiled": _Compiled(), "transformers": _transformers, "liger": _liger}
    return {name: found[name] for name in names if _applies(name, case, problem)}


def _applies(name: str, case: Case, problem: Problem) -> bool:
    device, dtype = problem.x_ND.device.type, problem.x_ND.dtype
    if name in ("cpu_tiled", "segment"):
        return device == "cpu" and (name == "cpu_tiled" or case.kind == "language")
    if name.startswith("grouped_mm"):
        takes = grouped_mm.takes(dtype, (case.d_model, case.d_ff))
        return takes and (name == "grouped_mm" or device == "cuda" or dtype != torch.float32)  # torch compiles no other
    if name == "transformers":
        return case.kind != "language" and find_spec("transformers") is not None
    if name == "liger":
        fits = case.kind == "token" and case.activation == "swiglu" and not case.bias
        return fits and device == "cuda" and find_spec("liger_kernel") is not None
    has_triton = device == "cuda" and find_spec("triton") is not None and case.activation in TRITON_ACTIVATIONS
    return name == "reference" or has_triton


def _dispatch(backend: Backend, problem: Problem) -> Tensor:
    return dispatch(problem.x_ND, problem.fresh_plan(), problem.experts, backend)


def _dense(problem: Problem) -> Tensor:
    only = ExpertWeights._make(None if t is None else t.flatten(0, 1) for t in problem.experts.stack())
    y_ND = feed_forward(problem.x_ND, only, problem.experts.activation)
    shared = problem.experts.shared_weights()
    return y_ND if shared is None else y_ND + feed_forward(problem.x_ND, shared, problem.experts.activation)


class _Compiled:
    """grouped_mm as torch.compile makes it, from sorted ids to the sum."""

    def __init__(self) -> None:
        self.run = torch.compile(grouped_mm.run)

    def __call__(self, problem: Problem) -> Tensor:
        return self.run(problem.x_ND, problem.fresh_plan(), problem.experts)


def _transformers(problem: Problem) -> Tensor:
    """What Hugging Face's models run with experts_implementation="grouped_mm", on our parameters."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    experts, activation = problem.experts, problem.experts.activation
    gated = activation == "swiglu"
    layer: Any = SimpleNamespace(
        num_experts=experts.num_experts,
        has_gate=gated,
        has_bias=experts.b1_EF is not None,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=False,
        down_proj=experts.w2_EDF,
        down_proj_bias=experts.b2_ED,
    )
    prefix = "gate_up_proj" if gated else "up_proj"
    setattr(layer, prefix, experts.w1_EFD)
    setattr(layer, f"{prefix}_bias", experts.b1_EF)
    setattr(layer, "_apply_gate" if gated else "act_fn", lambda z_NF: activate(z_NF, activation))
    return grouped_mm_experts_forward(layer, problem.x_ND, problem.plan.expert_ids, problem.plan.gates)


def _liger(problem: Problem) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    experts, plan = problem.experts, problem.plan
    return LigerFusedMoEFunction.apply(problem.x_ND, experts.w1_EFD, experts.w2_EDF, plan.expert_ids, plan.gates)
