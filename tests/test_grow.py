"""recipes/grow: the whole command on a corpus of noise, in which one of three languages is held out."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from mole_asr.corpus.manifest import Utterance, write_manifest

RECIPE = Path(__file__).parents[1] / "recipes" / "grow"
TEXTS = {"en": "abcd", "nl": "cdef", "ru": "жзик"}
TINY = {"d_model": 8, "d_ff": 8, "num_blocks": 2, "num_mole_blocks": 1, "language_tokenizer_block": 1, "num_heads": 1}
TINY |= {"intermediate_ctc_blocks": [1], "kernel_size": 3, "expert_d_ff": 8}
STAGES = ("before", "extended", "grown", "unreplayed", "shared", "pruned")
KNOWS_NEW = ("grown", "unreplayed", "shared")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The command of a copy of the recipe whose models are tiny."""
    folder = tmp_path / "recipes" / "grow"
    shutil.copytree(RECIPE, folder, ignore=shutil.ignore_patterns("*.json", "__pycache__", "*.svg"))
    base, recogniser = (yaml.safe_load((folder / name).read_text()) for name in ("base.yaml", "recogniser.yaml"))
    base["trainer"] |= {"max_epochs": 1, "precision": "32-true", "accelerator": "cpu", "log_every_n_steps": 1}
    recogniser["model"]["encoder"] |= TINY
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "recogniser.yaml").write_text(yaml.safe_dump(recogniser))
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("run")
    for name in ("run", "tables"):
        sys.modules.pop(name, None)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Where the corpus and the runs lie."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("dev", 2), ("test", 3)):
        utterances = []
        for code, letters in TEXTS.items():
            for n in range(count):
                path, text = tmp_path / "data" / f"{split}-{code}-{n}.wav", "".join(rng.choice(list(letters), 4))
                path.parent.mkdir(exist_ok=True)
                soundfile.write(path, rng.normal(0, 0.1, 8000), 16000)
                utterances.append(Utterance(f"{code}-{n}", path, 0.0, 0.5, 16000, text, code, num_samples=8000))
        write_manifest(utterances, tmp_path / "data" / f"cuts_{split}.jsonl")
    return ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--steps", "2"]


def rows_of(recipe: ModuleType) -> list[dict[str, Any]]:
    return json.loads((recipe.HERE / "results.json").read_text())


def test_the_whole_command(
    recipe: ModuleType, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe.main([*words, "--new", "nl"]) == 0
    table = capsys.readouterr().out.partition("| **nl** held out")[2]
    rows = rows_of(recipe)
    assert {(row["stage"], row["told"]) for row in rows} == {
        (stage, told) for stage in STAGES for told in (True, False)
    }
    for row in rows:
        told_what_it_lacks = row["told"] and row["stage"] not in KNOWS_NEW
        assert row["language"] != "nl" or not told_what_it_lacks
        assert (row["language_id_accuracy"] is None) == row["told"]
    old = [row for row in rows if row["language"] in ("en", "ru")]
    assert {row["utterances"] for row in old} == {3}
    # In all digits of a transcript: only who is heard in the new language may be transcribed otherwise.
    assert all(row["changed"] <= row["heard_as_new"] for row in old)
    assert not any(row["changed"] for row in old if row["told"] or row["stage"] not in KNOWS_NEW)
    parameters = {row["stage"]: row["total_parameters"] for row in rows}
    assert parameters["before"] < parameters["shared"] < parameters["grown"]
    assert parameters["pruned"] < parameters["grown"]
    assert {row["shares"] for row in rows if row["stage"] == "shared"} == {"en"}  # both are Germanic
    assert table.strip() in (recipe.HERE / "README.md").read_text()
    assert (recipe.HERE / "languages.svg").exists()

    before = (recipe.HERE / "results.json").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "gone")  # nothing of it is needed: all is done
    assert recipe.main([*words, "--new", "nl"]) == 0
    assert (recipe.HERE / "results.json").read_bytes() == before


def test_a_language_without_kin_shares_no_expert(recipe: ModuleType, words: list[str]) -> None:
    assert recipe.main([*words, "--new", "ru"]) == 0
    assert "shared" not in {row["stage"] for row in rows_of(recipe)}


def test_a_language_that_is_not_there(recipe: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.main([*words, "--new", "da"]) == 1
    assert "--new da" in capsys.readouterr().err
