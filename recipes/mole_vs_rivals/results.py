"""What was measured: `results.json` (a row a line) and `details.json` (utterances, histograms, loads), both below 2 MB.

Only the command writes them: after each run it reads them anew, adds what is new, and replaces them at once.
"""

import json
from pathlib import Path
from typing import Any

from mole_asr.errors import MoleError
from mole_asr.files import write_text

Row = dict[str, Any]
KEY = ("system", "condition", "seed", "test_set")


class Results:
    """The two files in a folder.

    Attributes:
        rows: of results.json: a row a test set and language, and one with the language "all".
        test_sets: name of the test set -> `ids_crc`, and `languages`, `words` and `characters` of its utterances.
        details: key of a test set's rows, joined by "/" -> `word_errors` and `character_errors` of its utterances,
            histograms of the reliability and who computed what.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read()

    def read(self) -> None:
        """Reads what is there now."""
        self.rows: list[Row] = _read(self.folder / "results.json", [])
        details = _read(self.folder / "details.json", {"test_sets": {}, "runs": {}})
        self.test_sets: dict[str, Any] = details["test_sets"]
        self.details: dict[str, Any] = details["runs"]

    def has(self, system: str, condition: str, seed: int, test_set: str) -> bool:
        """Whether a test set was measured."""
        return detail_key(system, condition, seed, test_set) in self.details

    def add(self, rows: list[Row], test_set: str, utterances: dict[str, Any], details: dict[str, Any]) -> None:
        """Adds the rows of one test set of one run.

        Args:
            rows: as in `rows`.
            test_set: name of the test set's entry in `test_sets`.
            utterances: that entry.
            details: the entry in `details`.

        Raises:
            MoleError: the test set is not the one that earlier runs were tested on.
        """
        self.read()
        if self.test_sets.setdefault(test_set, utterances) != utterances:
            raise MoleError(
                f"{self.folder / 'details.json'}: {test_set} is not what earlier runs were tested on: "
                "prepare the same corpus, or remove results.json and details.json to measure all anew"
            )
        key = detail_key(*(rows[0][name] for name in KEY))
        self.details[key] = details
        self.rows = [row for row in self.rows if detail_key(*(row[name] for name in KEY)) != key] + rows
        lines = ",\n".join(f"  {json.dumps(name)}: {_line(value)}" for name, value in sorted(self.details.items()))
        sets = ",\n".join(f"  {json.dumps(name)}: {_line(value)}" for name, value in sorted(self.test_sets.items()))
        text = f'{{\n"test_sets": {{\n{sets}\n}},\n"runs": {{\n{lines}\n}}\n}}\n'
        write_text(self.folder / "results.json", "[\n" + ",\n".join(map(_line, self.rows)) + "\n]\n")
        # Last: a run counts as done when it stands here.
        write_text(self.folder / "details.json", text)

    def select(self, **wanted: Any) -> list[Row]:
        """Rows that have these values."""
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]


def detail_key(system: str, condition: str, seed: int, test_set: str) -> str:
    """Name of one test set of one run."""
    return f"{condition}/{system}/{seed}/{test_set}"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _read(path: Path, nothing: Any) -> Any:
    if not path.exists():
        return nothing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoleError(f"{path}: not JSON ({error}); restore the file") from None
