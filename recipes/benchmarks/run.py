"""Measures the backends of `mole_asr.moe` and writes the table of README.md; `--table` only writes the table.

`python recipes/benchmarks/run.py`: forty minutes on one thread of a machine that is not in use.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from mole_asr.bench.moe import moe
from mole_asr.errors import MoleError
from mole_asr.score.markdown import markdown_table, write_between_marks
from mole_asr.score.results import read_json_or

HERE = Path(__file__).parent
DEVICES = ("cpu", "cuda")
# What is measured: the end of the file's name -> options of `mole-asr bench moe`.
MEASURED: dict[str, dict[str, Any]] = {
    "": {"d_model": (256, 512), "top_k": (1, 2), "neurons": (64, 128)},
    "_rows": {
        "kinds": ("token",),
        "experts": (4, 64),
        "rows": (1024, 60000),
        "skew": ("even", "skewed"),
        "backends": ("cpu_tiled", "triton", "grouped_mm"),
        "repeat": 3,
    },
    "_wide": {"kinds": ("token",), "d_model": (1024,), "rows": (4096,), "repeat": 3},
}
OURS = ("cpu_tiled", "segment", "triton")
RATIOS = ("ratio_dense", "ratio_grouped_mm", "ratio_transformers", "ratio_liger")
CASE = ("kind", "dtype", "d_model", "d_ff", "experts", "top_k", "rows", "skew")


def case_name(row: dict[str, Any]) -> str:
    """What a row measured, in words."""
    if row["kind"] == "slices":
        share = row["top_k"] / row["experts"]
        return f"{share:.0%} of a dense layer in slices of {row['d_ff']}"
    if row["kind"] == "language":
        return "1 expert an utterance + shared"
    return f"{row['top_k']} of {row['experts']} experts a row"


def ratios(row: dict[str, Any]) -> str:
    """Time over that of each peer, in the order of `RATIOS`."""
    if row["milliseconds"] is None:
        return "–"
    return ", ".join(
        "–" if row.get(name) is None else f"{row[name]:.2f}" for name in RATIOS[: 4 if _on_gpu(row) else 3]
    )


def file_of(device: str, measured: str) -> Path:
    """Where the rows of a measurement stand."""
    return HERE / f"moe_{device}{measured}.json"


def _on_gpu(row: dict[str, Any]) -> bool:
    return "thread" not in row["device"]


def table(path: Path) -> str:
    """A line a case and backend of ours."""
    rows: list[dict[str, Any]] = [row for row in read_json_or(path, []) if row["backend"] in OURS]
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = json.dumps([row["backend"], *(row[name] for name in CASE)])
        cases.setdefault(key, {})[row["pass"]] = row
    peers = "dense, grouped_mm, transformers" + (", Liger" if rows and _on_gpu(rows[0]) else "")
    header = ["case", "type", "D", "rows", "load", "backend", f"forward / {peers}", f"forward+backward / {peers}"]
    lines = []
    for passes in cases.values():
        row = next(iter(passes.values()))
        cells = [ratios(passes[name]) if name in passes else "–" for name in ("forward", "forward+backward")]
        sizes = [str(row[name]) for name in ("dtype", "d_model", "rows", "skew")]
        lines.append([case_name(row), *sizes, f"`{row['backend']}`", *cells])
    facts = rows[0]
    title = f"{facts['device']}, torch {facts['torch']}, {facts['date']}:"
    return f"{title}\n\n{markdown_table(header, lines)}"


def main() -> int:
    """Runs the command; 1 where something is wrong that the user can put right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing: only write the table into README.md")
    options = parser.parse_args()
    try:
        if not options.table:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            for name, sizes in MEASURED.items():
                moe(**sizes, device=device, output=str(file_of(device, name)))
        paths = [file_of(device, name) for device in DEVICES for name in MEASURED]
        text = "\n\n".join(table(path) for path in paths if path.exists())
        write_between_marks(HERE / "README.md", text)
        print(text)
    except MoleError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
