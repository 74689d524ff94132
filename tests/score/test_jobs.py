"""Calls side by side: all are made, none begins after a failure, and a process that is killed is said in one line."""

import os
import time
from pathlib import Path

import pytest
import torch

from mole_asr.errors import MoleError
from mole_asr.score.jobs import do_all, is_job
from mole_asr.score.results import ResultFile


def note(folder: Path, name: str) -> None:
    """Says where the call was made; that of "bad" fails, the others take a second."""
    (folder / name).write_text(f"{os.getpid()} {is_job()} {torch.get_num_threads()}")
    if name == "bad":
        raise MoleError("bad: as asked")
    time.sleep(1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_all_calls_are_made(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    do_all(note, [(tmp_path, name) for name in "abc"], jobs)
    notes = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert set(notes) == {"a", "b", "c"}
    processes = {process for process, *_ in notes.values()}
    assert len(processes) == jobs and (str(os.getpid()) in processes) == (jobs == 1)
    assert {tuple(rest) for _, *rest in notes.values()} == {("False", "6") if jobs == 1 else ("True", "3")}


def test_a_single_call_is_made_here(tmp_path: Path) -> None:
    do_all(note, [(tmp_path, "a")], 4)
    assert (tmp_path / "a").read_text().startswith(f"{os.getpid()} False")
    do_all(note, [], 4)


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_call_begins_after_a_failure(jobs: int, tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="bad: as asked"):
        do_all(note, [(tmp_path, name) for name in ("first", "bad", "third", "fourth", "fifth")], jobs)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "bad"}


def test_a_killed_process() -> None:
    with pytest.raises(MoleError, match="a process ended before its work"):
        do_all(os._exit, [(1,), (1,)], 2)


def test_no_row_is_lost_between_processes(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    do_all(ResultFile(path, ["name"]).add, [([{"name": str(row)}],) for row in range(300)], 2)
    assert len(ResultFile(path, ["name"]).rows) == 300
