"""What was measured: `results.json` (a row a line) and `details.json` (utterances, histograms, loads), both below 2 MB.

Only the command writes them: after each run it reads them anew, adds what is new, and replaces them at once.
"""

from pathlib import Path
from typing import Any

from mole_asr.errors import MoleError
from mole_asr.files import locked, write_text
from mole_asr.score.results import ResultFile, Row, json_line, read_json_or

KEY = ("system", "condition", "seed", "test_set")


class Results(ResultFile):
    """The two files in a folder.

    Attributes:
        rows: of results.json: a row a test set and language, and one with the language "all".
        test_sets: name of the test set -> `ids_crc`, and `languages`, `words` and `characters` of its utterances.
        details: key of a test set's rows, joined by "/" -> `word_errors` and `character_errors` of its utterances,
            histograms of the reliability, and of the test split also who computed what and the experts' gradients.
    """

    def __init__(self, folder: Path) -> None:
        self.details_path = folder / "details.json"
        super().__init__(folder / "results.json", KEY)

    def read(self) -> None:
        """Reads what is there now."""
        super().read()
        details = read_json_or(self.details_path, {"test_sets": {}, "runs": {}})
        self.test_sets: dict[str, Any] = details["test_sets"]
        self.details: dict[str, Any] = details["runs"]

    def add_run(self, rows: list[Row], test_set: str, utterances: dict[str, Any], details: dict[str, Any]) -> None:
        """Adds the rows of one test set of one run.

        Args:
            rows: as in `rows`.
            test_set: name of the test set's entry in `test_sets`.
            utterances: that entry.
            details: the entry in `details`.

        Raises:
            MoleError: the test set is not the one that earlier runs were tested on.
        """
        with locked(self.details_path):
            self.read()
            if self.test_sets.setdefault(test_set, utterances) != utterances:
                raise MoleError(
                    f"{self.details_path}: {test_set} is not what earlier runs were tested on: "
                    "prepare the same corpus, or remove results.json and details.json to measure all anew"
                )
            self.details[detail_key(*(rows[0][name] for name in KEY))] = details
            parts = [
                ",\n".join(f'  "{name}": {json_line(value)}' for name, value in sorted(entries.items()))
                for entries in (self.test_sets, self.details)
            ]
            write_text(self.details_path, f'{{\n"test_sets": {{\n{parts[0]}\n}},\n"runs": {{\n{parts[1]}\n}}\n}}\n')
            self.add(rows)  # last: a run counts as done when it stands there


def detail_key(system: str, condition: str, seed: int, test_set: str) -> str:
    """Name of one test set of one run."""
    return f"{condition}/{system}/{seed}/{test_set}"
