"""Calls side by side: all are made, an error is the caller's, and a process that is killed is said in one line."""

import os
from pathlib import Path

import pytest

from mole_asr.errors import MoleError
from mole_asr.score.jobs import do_all, is_job
from mole_asr.score.results import ResultFile, read_json


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_calls_are_made(jobs: int, tmp_path: Path) -> None:
    do_all(os.mkdir, [(tmp_path / name,) for name in "abc"], jobs)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
    assert not is_job()


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_a_call(jobs: int, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[{")
    with pytest.raises(MoleError, match=r"bad\.json: not JSON"):
        do_all(read_json, [(tmp_path / "none.json", []), (tmp_path / "bad.json", [])], jobs)


def test_a_killed_process() -> None:
    with pytest.raises(MoleError, match="one of 2 processes was killed"):
        do_all(os._exit, [(1,)], 2)


def test_no_row_is_lost_between_processes(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    do_all(ResultFile(path, ["name"]).add, [([{"name": str(row)}],) for row in range(300)], 2)
    assert len(ResultFile(path, ["name"]).rows) == 300
