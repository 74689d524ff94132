"""One case, measured: check every variant, time those that agree, and make a row of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from mole_asr.bench.cases import Case, Problem, make_dense, make_problem
from mole_asr.bench.check import BOUNDS, agrees, errors, reference, run_pass
from mole_asr.bench.timing import Ceilings, Timing, gpu_cost, time_in_turn
from mole_asr.bench.variants import DENSE, Run, dense_variants, variants

ANCHORS = (*DENSE, "grouped_mm", "grouped_mm_compiled", "transformers", "liger")
"""What a row's time is divided by, where they were measured."""


@dataclass(frozen=True)
class Checked:
    """A variant on its problem, with its largest error and what is wrong with it, if anything."""

    run: Run
    problem: Problem
    error: float | None
    refusal: str | None


def measure_case(
    case: Case,
    passes: Sequence[str],
    names: Sequence[str],
    repeat: int,
    device: torch.device,
    ceilings: Ceilings | None = None,
) -> list[dict[str, Any]]:
    """All variants of a case.

    Returns:
        One row for each pass and variant; `milliseconds` is None where the variant is refused, `refusal` says why.
    """
    problem, dense = make_problem(case, device), make_dense(case, device)
    rows = []
    for name in passes:
        checked = _check(case, dense_variants(), dense, name)
        checked |= _check(case, variants(case, problem, tuple(names)), problem, name)
        runs = {key: partial(run_pass, one.run, one.problem, name) for key, one in checked.items() if not one.refusal}
        timings = time_in_turn(runs, repeat, device)
        for key, one in checked.items():
            row = _describe(case, key, name, device) | _times(key, timings)
            if key in timings and ceilings is not None:
                row |= _gpu_columns(case, key, name, timings[key].milliseconds, ceilings)
                cost = gpu_cost(runs[key])
                row |= {"launches": cost.launches, "syncs": cost.syncs, "peak_megabytes": cost.peak_bytes / 1e6}
            rows.append(row | {"error": one.error, "refusal": one.refusal})
    return rows


def _times(key: str, timings: dict[str, Timing]) -> dict[str, float | None]:
    """Milliseconds and ratios of one variant; None for what was not timed."""
    mine = timings.get(key)
    row: dict[str, float | None] = {
        "milliseconds": None if mine is None else mine.milliseconds,
        "milliseconds_low": None if mine is None else mine.low,
        "milliseconds_high": None if mine is None else mine.high,
        "faulted_megabytes": None if mine is None else mine.faulted_megabytes,
    }
    for anchor in ANCHORS:
        its = timings.get(anchor)
        row[f"ratio_{anchor}"] = mine.milliseconds / its.milliseconds if mine and its else None
    return row


def _check(case: Case, runs: dict[str, Run], problem: Problem, name: str) -> dict[str, Checked]:
    expected = reference(problem, name)
    checked = {}
    for key, run in runs.items():
        try:
            found = errors(run, problem, expected, name)
        except Exception as error:  # other people's code fails in many ways, and the others are still worth a time
            checked[key] = Checked(run, problem, None, f"fails: {str(error).splitlines()[0][:100] or type(error)}")
            continue
        bounds = " and ".join(f"{bound:g}" for bound in BOUNDS[case.dtype])
        refusal = None if agrees(found, case.dtype) else f"disagrees with the reference: {max(found):.1e}, not {bounds}"
        checked[key] = Checked(run, problem, max(found), refusal)
    return checked


def _describe(case: Case, backend: str, name: str, device: torch.device) -> dict[str, Any]:
    return {
        "backend": backend,
        "device": device_name(device),
        "dtype": case.dtype,
        "d_model": case.d_model,
        "d_ff": case.d_ff,
        "experts": case.experts,
        "top_k": case.top_k,
        "rows": case.rows,
        "skew": case.skew,
        "pass": name,
        "kind": case.kind,
        "activation": case.activation,
        "bias": case.bias,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _gpu_columns(case: Case, backend: str, name: str, milliseconds: float, ceilings: Ceilings) -> dict[str, float]:
    """Speed, and how near it is to the roofline of the case (see `Case.bytes_moved`)."""
    case = case.dense() if backend in DENSE else case
    flops = case.flops * (1 if name == "forward" else 3)
    least = ceilings.roofline_ms(flops, case.bytes_moved(backward=name != "forward"))
    return {"tflops": 1e-9 * flops / milliseconds, "roofline_percent": 100 * least / milliseconds}


def device_name(device: torch.device) -> str:
    """The processor's name, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "CPU"
    return f"{model}, 1 thread"
