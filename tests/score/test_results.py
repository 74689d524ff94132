import json
from pathlib import Path

import pytest

from mole_asr.errors import MoleError
from mole_asr.score.results import ResultFile, macro

KEY = ("system", "test_set")


def row(system: str, language: str = "all", **more: object) -> dict:
    return {"system": system, "test_set": "t", "language": language, **more}


def test_rows_of_one_key_replace_each_other(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "results.json", KEY)
    assert results.select(system="a") == []
    results.add([row("a", "fr", wer=1), row("a", wer=1)])
    results.add([row("b", wer=2)])
    results.add([row("a", wer=3)])
    assert results.rows == [row("b", wer=2), row("a", wer=3)]
    assert results.select(system="a", language="all") == [row("a", wer=3)]
    assert json.loads((tmp_path / "results.json").read_text()) == results.rows
    assert len((tmp_path / "results.json").read_text().splitlines()) == 4  # a row a line


def test_two_commands_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    first, second = (ResultFile(tmp_path / "results.json", KEY) for _ in range(2))
    first.add([row("a")])
    second.add([row("b")])
    first.add([row("c")])
    assert ResultFile(tmp_path / "results.json", KEY).rows == [row("a"), row("b"), row("c")]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[\n{")
    with pytest.raises(MoleError, match=r"results\.json: not JSON"):
        ResultFile(tmp_path / "results.json", KEY)


def test_macro() -> None:
    rows = {"en": {"wer": 10.0}, "fr": {"wer": 40.0}, "it": {"wer": None}, "all": {"wer": 99.0}}
    assert macro(rows, "wer") == 25.0
    assert macro(rows, "wer", ["fr", "it", "xx"]) == 40.0
    assert macro(rows, "wer", ["it"]) is None
