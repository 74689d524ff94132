"""The `results.json` of a recipe: a row a line, which its command alone writes, and from which its tables are made."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from mole_asr.errors import MoleError
from mole_asr.files import locked, write_text

Row = dict[str, Any]


class ResultFile:
    """Rows that were measured.

    Args:
        path: of the file; it need not be there yet.
        key: columns that say what was measured. Rows of one key were measured together, one a language and one with
            the language "all".

    Attributes:
        path: of the file.
        rows: what it held when it was last read or written.

    Raises:
        MoleError: the file is damaged.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self.key = path, tuple(key)
        self.read()

    def read(self) -> None:
        """Reads what is there now."""
        self.rows: list[Row] = read_json_or(self.path, [])

    def select(self, **wanted: Any) -> list[Row]:
        """Rows that have these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in wanted.items())]

    def lacks(self, steps: int, **wanted: Any) -> bool:
        """Whether no row of a training has these values, the system's name among them.

        Raises:
            MoleError: there is one, and it comes from another number of steps.
        """
        old = self.select(**wanted)
        if old and old[0]["steps"] != steps:
            raise MoleError(
                f"{self.path}: {wanted['system']} was trained for {old[0]['steps']} steps, not {steps}: give --steps"
            )
        return not old

    def add(self, rows: Sequence[Row]) -> None:
        """Writes these rows in place of those of the same keys; what other commands wrote meanwhile stays."""
        new = {self._key_of(row) for row in rows}
        with locked(self.path):
            self.read()
            self.rows = [row for row in self.rows if self._key_of(row) not in new] + list(rows)
            write_text(self.path, "[\n" + ",\n".join(map(json_line, self.rows)) + "\n]\n")

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.key)


def read_json_or(path: Path, nothing: Any) -> Any:
    """Returns what a JSON file holds, or `nothing` where it is missing.

    Raises:
        MoleError: it is not JSON.
    """
    if not path.exists():
        return nothing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoleError(f"{path}: not JSON ({error}); restore the file") from None


def json_line(value: Any) -> str:
    """JSON on one line, as short as it gets."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def macro(rows: Mapping[str, Row], key: str, languages: Iterable[str] | None = None) -> float | None:
    """Mean of a figure over languages; those that lack it are left out, None where all do.

    Args:
        rows: language -> row; "all" is passed over.
        key: name of the figure.
        languages: of these alone.
    """
    values = [rows[code][key] for code in (languages or rows) if code != "all" and code in rows]
    known = [value for value in values if value is not None]
    return mean(known) if known else None
