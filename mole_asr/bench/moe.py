"""The `bench moe` verb: what each way of computing a mixture of experts costs here."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mole_asr.arguments import check_at_least, check_device
from mole_asr.errors import MoleError
from mole_asr.files import write_text
from mole_asr.moe.experts import Activation


@dataclass(frozen=True)
class Bench:
    """All rows of all cases."""

    rows: list[dict[str, Any]]

    @property
    def failures(self) -> list[str]:
        """A line for each backend of ours that disagrees with the reference or fails."""
        from mole_asr.bench.variants import OTHERS

        refused = [row for row in self.rows if row["refusal"] and row["backend"] not in OTHERS]
        return [f"{row['backend']}: {row['refusal']}" for row in refused]


def moe(
    kinds: Sequence[str] = ("token", "language", "slices"),
    dtype: Sequence[str] = ("float32", "bfloat16"),
    d_model: Sequence[int] = (256,),
    d_ff: int | None = None,
    experts: Sequence[int] = (8,),
    top_k: Sequence[int] = (2,),
    rows: Sequence[int] = (8192,),
    skew: Sequence[str] = ("even",),
    neurons: Sequence[int] = (64,),
    passes: Sequence[str] = ("forward", "forward+backward"),
    activation: Activation = "silu",
    bias: bool = True,
    backends: Sequence[str] = (),
    compile: bool = False,
    repeat: int = 5,
    device: str | None = None,
    output: str | None = None,
) -> Bench:
    """Measures all cases of the given sizes and prints a table for each. Without options it takes two minutes on a CPU.

    Nothing is timed that disagrees with the reference in float64.

    Args:
        kinds: token (each row has its own experts), language (one expert an utterance, and the shared one), slices (a
            quarter of the slices of one dense layer).
        dtype: float32, bfloat16.
        d_model: widths of the model.
        d_ff: width of an expert, for slices of the whole layer; left out, 4 x d_model.
        experts: numbers of experts.
        top_k: experts a row, for token.
        rows: rows of a batch.
        skew: even, skewed (expert e as likely as 1/e^2).
        neurons: widths of a slice.
        passes: forward, forward+backward.
        activation: of the experts; slices have relu.
        bias: whether the experts have biases; slices have none.
        backends: what to measure beside the dense layers; left out, all that work here but the slow reference.
        compile: whether grouped_mm is measured compiled too, which takes half a minute a case.
        repeat: how often; the median counts.
        device: cpu or cuda; left out, the GPU if there is one.
        output: file for all rows (.json).

    Raises:
        MoleError: an option has no such value, or there is no such device.
    """
    import torch

    from mole_asr.bench.cases import KINDS, SKEWS, select_cases
    from mole_asr.bench.check import BOUNDS, PASSES
    from mole_asr.bench.measure import device_name, measure_case
    from mole_asr.bench.table import table
    from mole_asr.bench.timing import measure_ceilings, quiet
    from mole_asr.bench.variants import NAMES

    options = {"kinds": (kinds, KINDS), "dtype": (dtype, BOUNDS), "skew": (skew, SKEWS), "passes": (passes, PASSES)}
    for option, (values, allowed) in {**options, "backends": (backends, NAMES)}.items():
        _check(option, values, allowed)
    if output is not None and not output.endswith(".json"):
        raise MoleError(f"{output}: the rows are written as .json; give such a name")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    place = torch.device(device)
    left_out = {"reference"} if compile else {"reference", "grouped_mm_compiled"}
    names = list(backends) or [name for name in NAMES if name not in left_out]
    check_at_least(1, repeat=repeat)
    cases = list(select_cases(kinds, dtype, d_model, experts, top_k, rows, skew, activation, bias, d_ff, neurons))
    if not cases:
        raise MoleError("--top-k: is above all --experts, so there is nothing to measure")
    print(f"{device_name(place)}, torch {torch.__version__}: median of {repeat}, {len(cases)} cases", flush=True)
    found: list[dict[str, Any]] = []
    with quiet():
        for case in cases:
            print(f"\n{case}", flush=True)
            ceilings = measure_ceilings(getattr(torch, case.dtype), place) if place.type == "cuda" else None
            measured = measure_case(case, passes, names, repeat, place, ceilings)
            print(table(measured), flush=True)
            found += measured
            if output is not None:  # after each case, so that an interrupted run leaves what it has
                write_text(output, json.dumps(found, indent=1) + "\n")
    idle = [name for name in backends if all(row["backend"] != name for row in found)]
    if idle:
        print(f"\nnot measured, as they compute none of these cases on this device: {', '.join(idle)}")
    return Bench(found)


def _check(option: str, values: Sequence[str], allowed: Iterable[str]) -> None:
    for value in values:
        if value not in allowed:
            raise MoleError(f"--{option} {value}: give {', '.join(allowed)}")
