"""What was measured: `results.json`, a row a line, written by the command only."""

import json
from pathlib import Path
from typing import Any

from mole_asr.files import write_text

Row = dict[str, Any]


class Results:
    """The file in a folder.

    Attributes:
        rows: each of a system, a test set and a language; "all" stands for all utterances together.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"
        self.rows: list[Row] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []

    def has(self, system: str, test_set: str) -> bool:
        """Whether a system was measured on a test set."""
        return bool(self.of(system, test_set))

    def of(self, system: str, test_set: str) -> dict[str, Row]:
        """Language -> row."""
        return {r["language"]: r for r in self.rows if r["system"] == system and r["test_set"] == test_set}

    def add(self, rows: list[Row]) -> None:
        """Adds rows in place of those of the same system and test set, and writes the file."""
        new = {(row["system"], row["test_set"]) for row in rows}
        self.rows = [row for row in self.rows if (row["system"], row["test_set"]) not in new] + rows
        lines = (json.dumps(row, ensure_ascii=False) for row in self.rows)
        write_text(self.path, "[\n" + ",\n".join(lines) + "\n]\n")
