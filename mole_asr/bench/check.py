"""Whether a variant computes what the reference computes: nothing that fails this is timed.

Shape letters: N rows.
"""

import torch
from torch import Tensor

from mole_asr.bench.cases import Problem
from mole_asr.bench.variants import Run
from mole_asr.moe.dispatch import dispatch

PASSES = ("forward", "forward+backward")
# What is still rounding, relative to the reference: of the output, of gradients. A gradient may also differ where a
# ReLU is open in one type and closed in the other.
BOUNDS = {"float32": (1e-5, 1e-3), "bfloat16": (3e-2, 3e-2)}


def run_pass(run: Run, problem: Problem, name: str) -> list[Tensor]:
    """The output; with the backward pass also the gradient of each of `problem.inputs()`."""
    if name == "forward":
        with torch.no_grad():
            return [run(problem)]
    y_ND = run(problem)
    return [y_ND.detach(), *torch.autograd.grad(y_ND, problem.inputs(), problem.dy_ND.to(y_ND.dtype))]


def reference(problem: Problem, name: str) -> list[Tensor]:
    """What a pass gives in float64."""
    double = problem.in_double()
    return run_pass(lambda p: dispatch(p.x_ND, p.plan, p.experts, "reference"), double, name)


def errors(run: Run, problem: Problem, expected: list[Tensor], name: str) -> list[float]:
    """The error of the output's worst row, then of each gradient as a whole."""
    y_ND, *gradients = run_pass(run, problem, name)
    wholes = [error(mine, their) for mine, their in zip(gradients, expected[1:], strict=True)]
    return [row_error(y_ND, expected[0]), *wholes]


def error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; infinite where it is no number."""
    return _ratio((found.double() - expected).norm(), expected.norm())


def row_error(found_ND: Tensor, expected_ND: Tensor) -> float:
    """The norm of the row with the largest difference, relative to a typical row of the reference.

    One row that is wrong shows, however many are right.
    """
    worst = (found_ND.double() - expected_ND).norm(dim=-1).max()
    return _ratio(worst, expected_ND.norm(dim=-1).square().mean().sqrt())


def agrees(found: list[float], dtype: str) -> bool:
    """Whether all errors of a pass are within the bounds."""
    output, gradient = BOUNDS[dtype]
    return found[0] <= output and all(one <= gradient for one in found[1:])


def _ratio(difference: Tensor, size: Tensor) -> float:
    if difference == 0:
        return 0.0
    ratio = float(difference / size)
    return ratio if ratio == ratio else float("inf")
