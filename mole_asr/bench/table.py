"""Rows of measurements as text."""

from typing import Any

_COLUMNS = {
    "ratio_dense": "/dense",
    "ratio_dense_tiled": "/tiled",
    "ratio_grouped_mm": "/grouped",
    "ratio_grouped_mm_compiled": "/compiled",
    "ratio_transformers": "/hf",
    "ratio_liger": "/liger",
    "faulted_megabytes": "faults MB",
    "tflops": "TFLOP/s",
    "roofline_percent": "roof %",
    "launches": "launches",
    "syncs": "syncs",
    "peak_megabytes": "peak MB",
}
_DIGITS = {"faulted_megabytes": 0, "tflops": 1, "roofline_percent": 0, "launches": 0, "syncs": 0, "peak_megabytes": 1}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one case; columns that no row fills are left out."""
    columns = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    heads = "".join(f"{_COLUMNS[key]:>10}" for key in columns)
    lines = [f"  {'pass':<17}{'backend':<20}{'ms':>10} {'quartiles':>18}{heads}{'error':>10}"]
    lines += [_line(row, columns) for row in rows]
    return "\n".join(lines)


def _line(row: dict[str, Any], columns: list[str]) -> str:
    start = f"  {row['pass']:<17}{row['backend']:<20}"
    if row["milliseconds"] is None:
        return f"{start}refused, {row['refusal']}"
    quartiles = f"{row['milliseconds_low']:.4g}..{row['milliseconds_high']:.4g}"
    cells = "".join(_cell(row.get(key), _DIGITS.get(key, 2)) for key in columns)
    return f"{start}{row['milliseconds']:>10.4g} {quartiles:>18}{cells}{row['error']:>10.1e}"


def _cell(value: float | None, digits: int) -> str:
    return f"{'–':>10}" if value is None else f"{value:>10.{digits}f}"
