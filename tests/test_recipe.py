"""recipes/prompts5/run.sh with a stand-in for `mole-asr`: what is run anew, what is refused, which times count."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Writes what the real verbs leave; notes its words in `calls`. Where a file `skips` is, training and transcribing skip
# something; where a file `fails` is, no training comes to its end.
STAND_IN = """#!/usr/bin/env bash
echo "$1" >>calls
case $1 in
    prepare) mkdir -p "$3"; for s in train dev test; do [ -e "$3/cuts_$s.jsonl" ] || touch "$3/cuts_$s.jsonl"; done ;;
    tokenizer) mkdir -p "$4"; touch "$4/tokenizer.model" ;;
    fit) mkdir -p out/checkpoints out/model out/logs; touch out/checkpoints/last.ckpt; ! [ -e fails ] || exit 1
        touch out/model/model.safetensors; ! [ -e skips ] ;;
    transcribe) mkdir -p "$6"; case $2 in *.jsonl) echo {} >out/transcripts/cuts_test.jsonl; ! [ -e skips ] ;; esac ;;
    report) echo "$*" >report-words; echo table ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("recipes/prompts5/run.sh", "conf/asr/prompts5.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "mole-asr").write_text(STAND_IN)
    (tmp_path / ".venv" / "bin" / "mole-asr").chmod(0o755)
    return tmp_path


def run(folder: Path, *arguments: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """The verbs that were called, and what was shown."""
    (folder / "calls").unlink(missing_ok=True)
    shown = subprocess.run(
        ["bash", "recipes/prompts5/run.sh", *arguments],
        cwd=folder,
        env={**os.environ, "OUT": "out", "DATA": "data", "FILE": ""},
        capture_output=True,
        text=True,
    )
    return (folder / "calls").read_text().split() if (folder / "calls").exists() else [], shown


def test_what_is_done_stays_done(folder: Path) -> None:
    whole = ["prepare", "tokenizer", "fit", "transcribe", "report", "transcribe"]
    assert run(folder)[0] == whole
    assert run(folder)[0] == ["prepare", "transcribe"]
    calls, shown = run(folder, "--trainer.max_epochs", "9", "--trainer.x=1")  # more epochs: the training goes on
    assert "fit" in calls and shown.returncode == 0
    assert shown.stdout.count("table") == 1


@pytest.mark.parametrize("change", ["config", "arguments"])
def test_old_weights_are_not_taken_for_another_configuration(folder: Path, change: str) -> None:
    run(folder)
    words = ["--model.encoder.d_ff", "7"] if change == "arguments" else []
    if change == "config":
        with (folder / "conf" / "asr" / "prompts5.yaml").open("a") as file:
            file.write("# a remark changes nothing\n")
        assert run(folder)[1].returncode == 0
        with (folder / "conf" / "asr" / "prompts5.yaml").open("a") as file:
            file.write("average_decay: 0.9\n")
    calls, shown = run(folder, *words)
    assert (calls, shown.returncode) == ([], 1)
    assert shown.stderr == "out was trained with another configuration: give another OUT, or remove out/checkpoints\n"
    shutil.rmtree(folder / "out" / "checkpoints")
    (folder / "out" / "seconds").write_text("5000")
    calls, shown = run(folder, *words)
    assert "fit" in calls and shown.returncode == 0
    assert int((folder / "out" / "seconds").read_text()) < 1000  # those of the earlier run do not count


def test_times_of_interrupted_runs_add_up(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "seconds").write_text("5000")
    run(folder)
    assert 5000 <= int((folder / "report-words").read_text().split("--seconds ")[1].split()[0]) < 6000


def test_a_skipped_utterance_does_not_stop_the_report(folder: Path) -> None:
    (folder / "skips").touch()
    calls, shown = run(folder)
    assert "report" in calls and shown.returncode == 0


def test_a_training_that_fails_stops_it_even_beside_an_old_model(folder: Path) -> None:
    run(folder)
    (folder / "fails").touch()
    calls, shown = run(folder, "--trainer.max_epochs=9")
    assert calls[-1] == "fit" and shown.returncode == 1
