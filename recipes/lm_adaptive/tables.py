"""The tables of README.md, from results.json alone."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from plan import REFERENCE, SYSTEMS, THRESHOLDS

from mole_asr.score.markdown import (
    ABSENT,
    markdown_pictures,
    markdown_table,
    mean_and_spread,
    write_between_marks,
)
from mole_asr.score.results import ResultFile, Row

PICTURES = {
    "curves.svg": "bits a byte of the dev texts over seconds and over FLOPs of training",
    "shares.svg": "share of tokens with two experts in each layer, over the training",
}
STEP, BITS, _, CPU, FLOPS = range(5)  # columns of a curve


def write_tables(results: ResultFile, readme: Path) -> str:
    """Makes all tables and writes them into the README between its marks, with the pictures; returns them."""
    systems = [name for name, each in SYSTEMS.items() if not each.goes_on and _runs(results, name)]
    parts = [table(results, systems) for table in (_equal_steps, _equal_loss, _layers)] if systems else []
    parts += [_gates(results), _continued(results)]
    text = "\n\n".join(part for part in (*parts, markdown_pictures(readme.parent, PICTURES)) if part)
    write_between_marks(readme, text)
    return text


def _runs(results: ResultFile, system: str) -> list[Row]:
    return results.select(system=system, kind="quality")


def _relative(value: float | None, reference: float | None, digits: int = 2) -> str:
    return ABSENT if value is None or not reference else f"{value / reference:.{digits}f}x"


def _two_experts(row: Row) -> float:
    return mean(layer["several_share"] for layer in row["layers"]) if row["layers"] else 0.0


def _equal_steps(results: ResultFile, systems: list[str]) -> str:
    header = ["equal steps", "bits a byte", "two experts", "FLOPs a token", "FFN FLOPs", "train step", "forward"]
    header += ["training, CPU", "active / total M"]
    speed = {row["system"]: row for row in results.select(kind="speed")}
    reference = _runs(results, REFERENCE)
    lines = []
    for name in systems:
        runs = _runs(results, name)
        cells = [SYSTEMS[name].title, mean_and_spread([row["bits_per_byte"] for row in runs], 3)]
        cells.append(f"{100 * mean(map(_two_experts, runs)):.1f} %")
        for key, unit in (("flops", 1e6), ("feed_forward_flops", 1e6)):
            value = mean(row[key] for row in runs)
            cells.append(f"{value / unit:.2f} M ({_relative(value, _mean(reference, key))})")
        for key in ("step_ms", "forward_ms"):
            value = speed.get(name, {}).get(key)
            relative = _relative(value, speed.get(REFERENCE, {}).get(key))
            cells.append(ABSENT if value is None else f"{value:.0f} ms ({relative})")
        seconds = mean(row["cpu_seconds"] for row in runs)
        cells.append(f"{seconds:.0f} s ({_relative(seconds, _mean(reference, 'cpu_seconds'))})")
        cells.append(f"{runs[0]['active_parameters'] / 1e6:.2f} / {runs[0]['total_parameters'] / 1e6:.2f}")
        lines.append(cells)
    return markdown_table(header, lines)


def _mean(rows: Sequence[Row], key: str) -> float | None:
    return mean(row[key] for row in rows) if rows else None


def target_of(results: ResultFile, systems: list[str]) -> float:
    """The loss that all trainings reached: the worst of their best."""
    return max(min(point[BITS] for point in row["curve"]) for name in systems for row in _runs(results, name))


def reached(curve: Sequence[Sequence[float]], target: float) -> list[float]:
    """All columns of a curve where its loss first comes down to the target, straight lines between validations."""
    for before, after in zip([curve[0], *curve], curve, strict=False):
        if after[BITS] <= target:
            drop = before[BITS] - after[BITS]
            share = (before[BITS] - target) / drop if drop > 0 else 0.0
            return list(np.array(before) + share * (np.array(after) - np.array(before)))
    raise ValueError(f"never reaches {target}")


def _equal_loss(results: ResultFile, systems: list[str]) -> str:
    target = target_of(results, systems)
    header = [f"to {target:.3f} bits a byte of the dev texts", "steps", "training FLOPs", "seconds, CPU"]
    header.append("step time x steps")
    speed = {row["system"]: row["step_ms"] for row in results.select(kind="speed")}
    found: dict[str, Any] = {
        name: np.mean([reached(row["curve"], target) for row in _runs(results, name)], axis=0) for name in systems
    }
    steps = {name: point[STEP] + 1 for name, point in found.items()}  # they are numbered from 0
    timed = {name: steps[name] * speed[name] / 1000 for name in systems if name in speed}
    lines = []
    for name, point in found.items():
        cells = [SYSTEMS[name].title, f"{steps[name]:.0f}"]
        for column, unit, label in ((FLOPS, 1e12, "T"), (CPU, 1, "s")):
            reference = found[REFERENCE][column] if REFERENCE in found else None
            cells.append(f"{point[column] / unit:.0f} {label} ({_relative(point[column], reference)})")
        own = timed.get(name)
        cells.append(ABSENT if own is None else f"{own:.0f} s ({_relative(own, timed.get(REFERENCE))})")
        lines.append(cells)
    return markdown_table(header, lines)


def _layers(results: ResultFile, systems: list[str]) -> str:
    chosen = [name for name in systems if SYSTEMS[name].is_adaptive]
    if not chosen:
        return ""
    layers = [layer["layer"] for layer in _runs(results, chosen[0])[0]["layers"]]
    lines = []
    for name in chosen:
        runs = _runs(results, name)
        columns = [[row["layers"][place]["several_share"] for row in runs] for place in range(len(layers))]
        lines.append([SYSTEMS[name].title, *(f"{100 * mean(column):.1f} %" for column in columns)])
    return markdown_table(["tokens with two experts", *(f"layer {layer}" for layer in layers)], lines)


def _gates(results: ResultFile) -> str:
    """What a second expert is worth to the tokens that a threshold gives one."""
    runs = {T: results.select(kind="gate", threshold=T) for T in THRESHOLDS}
    if not all(runs.values()):
        return ""
    header = [
        "top-2 model, gated otherwise",
        "tokens with two experts",
        "bits a byte",
        "of what the second expert gives",
    ]
    bits = {T: mean(row["bits_per_byte"] for row in rows) for T, rows in runs.items()}
    none, everything = bits[THRESHOLDS[0]], bits[THRESHOLDS[-1]]
    lines = [
        [
            f"T = {T:g}",
            f"{100 * mean(map(_two_experts, rows)):.1f} %",
            mean_and_spread([row["bits_per_byte"] for row in rows], 3),
            f"{100 * (none - bits[T]) / (none - everything):.0f} %",
        ]
        for T, rows in runs.items()
    ]
    return markdown_table(header, lines)


def _continued(results: ResultFile) -> str:
    """How those end that go on from the same top-2 model, beside the one that stays top-2."""
    systems = [name for name, each in SYSTEMS.items() if each.goes_on and _runs(results, name)]
    reference = {row["seed"]: row for row in _runs(results, f"continued-{REFERENCE}")}
    header = [
        "goes on from the top-2 model as",
        "tokens with two experts",
        "bits a byte",
        "less top-2's",
        "FLOPs a token",
    ]
    lines = []
    for name in systems:
        runs = [row for row in _runs(results, name) if row["seed"] in reference]
        if not runs:
            continue
        worse = [row["bits_per_byte"] - reference[row["seed"]]["bits_per_byte"] for row in runs]
        flops = mean(row["flops"] for row in runs)
        lines.append(
            [
                SYSTEMS[name].title,
                f"{100 * mean(map(_two_experts, runs)):.1f} %",
                mean_and_spread([row["bits_per_byte"] for row in runs], 3),
                mean_and_spread(worse, 3),
                _relative(flops, mean(row["flops"] for row in reference.values())),
            ]
        )
    return markdown_table(header, lines) if lines else ""
