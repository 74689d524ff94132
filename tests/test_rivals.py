"""recipes/mole_vs_rivals: its configs, and the whole command on a corpus of noise."""

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

from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.asr.parameters import count_parameters
from mole_asr.corpus.manifest import Utterance, write_manifest

RECIPE = Path(__file__).parents[1] / "recipes" / "mole_vs_rivals"
MODULES = ("plan", "results", "training", "measure", "tables", "pictures", "run")
LANGUAGES = ["en", "es", "fr", "it", "ru"]
TEXTS = {"en": "abc", "es": "bcd", "fr": "cde", "it": "dea", "ru": "жзи"}
TINY = {"d_model": 8, "d_ff": 8, "num_blocks": 2, "num_mole_blocks": 1, "language_tokenizer_block": 1, "num_heads": 1}
TESTS = {"test", "noisy", "telephone"}  # without the other corpus
TAKEN = {"en": 10, "es": 2, "fr": 5, "it": 10, "ru": 1}  # of 10 utterances, in prompts5-low
TINY |= {"intermediate_ctc_blocks": [1], "kernel_size": 3}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of a copy of the recipe whose models are tiny."""
    folder = tmp_path / "recipes" / "mole_vs_rivals"
    shutil.copytree(RECIPE, folder, ignore=shutil.ignore_patterns("*.json", "__pycache__", "*.svg"))
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["model"]["encoder"] = TINY
    base["trainer"] |= {"max_epochs": 1, "precision": "32-true", "accelerator": "cpu", "log_every_n_steps": 1}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    monkeypatch.syspath_prepend(str(folder))
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A corpus of noise in five languages, without new speakers."""
    rng = np.random.default_rng(0)
    corpus = tmp_path / "data" / "prompts5"
    (corpus / "audio").mkdir(parents=True)
    for split, count in (("train", 10), ("dev", 1), ("test", 2)):
        utterances = []
        for code in LANGUAGES:
            for n in range(count):
                path = corpus / "audio" / f"{split}-{code}-{n}.wav"
                soundfile.write(path, rng.normal(0, 0.1, 8000), 16000)
                utterances.append(Utterance(f"{code}-{n}", path, 0.0, 0.5, 16000, TEXTS[code], code, num_samples=8000))
        write_manifest(utterances, corpus / f"cuts_{split}.jsonl")
    return tmp_path / "data"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())


def test_the_whole_command(
    recipe: dict[str, ModuleType], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recipe["plan"].HERE
    words = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--conditions", "prompts5-low", "--epochs", "1"]
    systems = ["--systems", "dense", "mole", "mole-true"]
    main = recipe["run"].main
    assert main([*words, *systems, "--jobs", "2"]) == 0
    table = capsys.readouterr().out.partition("### ")[2]
    rows = rows_of(folder)
    assert {(row["system"], row["test_set"]) for row in rows} == {
        (system, test) for system in ("dense", "mole", "mole-true") for test in TESTS
    }
    assert len(rows) == 3 * 3 * (len(LANGUAGES) + 1)
    for row in rows:
        assert row["wer"] >= 0 and row["words"] == (10 if row["language"] == "all" else 2)
        taken = TAKEN.get(row["language"], sum(TAKEN.values()))
        assert row["train_hours"] == pytest.approx(0.5 * taken / 3600, abs=1e-4)
        assert (row["language_id_accuracy"] is None) == (row["system"] == "mole-true")
        assert row["epochs"] == 1 and row["train_seconds"] > 0 and row["real_time_factor"] > 0
    # One config lies over the other.
    config = json.loads((tmp_path / "runs/prompts5-low/dense/seed0/model/config.json").read_text())["encoder"]
    assert (config["mixture"], config["expert_d_ff"], config["d_model"]) == ("dense", 768, TINY["d_model"])
    # mole-true took the model of mole.
    times = {row["system"]: row["train_seconds"] for row in rows}
    assert times["mole"] == times["mole-true"]
    assert not (tmp_path / "runs/prompts5-low/mole-true/seed0/model").exists()
    trained = (tmp_path / "runs" / "prompts5-low" / "cuts_train.jsonl").read_text().splitlines()
    counts = {code: sum(f'"id": "{code}-' in line for line in trained) for code in LANGUAGES}
    assert counts == TAKEN
    assert "MoLE, r = largest posterior" in table and table.strip() in (folder / "README.md").read_text()

    before = (folder / "results.json").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "gone")  # nothing of it is needed: all is done
    assert main([*words, *systems]) == 0
    assert (folder / "results.json").read_bytes() == before
    assert main(["--pictures"]) == 0
    pictures = {"wer_by_hours.svg", "reliability.svg", "experts.svg", "gradients.svg"}
    assert {path.name for path in folder.glob("*.svg")} == pictures == set(recipe["tables"].PICTURES)
    assert "(gradients.svg)" not in table
    assert main(["--table"]) == 0
    assert all(f"]({name})" in (folder / "README.md").read_text() for name in pictures)
    gradients = json.loads((folder / "details.json").read_text())["runs"]["prompts5-low/mole/0/test"]["gradients"]
    assert set(gradients) == {*LANGUAGES, "agnostic"} and min(map(min, gradients.values())) > 0


def test_a_new_test_set_needs_no_new_training(recipe: dict[str, ModuleType], data: Path, tmp_path: Path) -> None:
    folder = recipe["plan"].HERE
    words = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--systems", "switch"]
    assert recipe["run"].main(words) == 0
    first = rows_of(folder)
    assert {row["test_set"] for row in first} == TESTS
    (data / "voices13").mkdir()
    (data / "voices13" / "cuts_test.jsonl").touch()
    voices = (data / "prompts5" / "cuts_train.jsonl").read_text().replace('"id": "fr-', '"id": "tuxpaint-fr-')
    (data / "voices13" / "cuts_unseen.jsonl").write_text(voices)
    assert recipe["run"].main(words) == 0
    rows = rows_of(folder)
    assert rows[: len(first)] == first and {row["test_set"] for row in rows} == TESTS | {"unseen"}
    assert len({row["train_seconds"] for row in rows}) == 1
    assert [row["language"] for row in rows if row["test_set"] == "unseen"] == ["fr", "all"]


def test_synthetic_voices_are_trained_on_too(
    recipe: dict[str, ModuleType], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--systems", "omni"]
    words += ["--conditions", "prompts5-synthetic"]
    assert recipe["run"].main(words) == 1
    assert "mole-asr prepare synthetic" in capsys.readouterr().err
    voices = (data / "prompts5" / "cuts_train.jsonl").read_text().replace('"id": "', '"id": "synthetic-')
    (data / "prompts5-synthetic").mkdir()
    (data / "prompts5-synthetic" / "cuts_train.jsonl").write_text(voices)
    assert recipe["run"].main(words) == 0
    hours = [row["train_hours"] for row in rows_of(recipe["plan"].HERE) if row["language"] == "fr"]
    assert hours == pytest.approx([2 * 10 * 0.5 / 3600] * len(TESTS), abs=1e-4)


def test_another_configuration_or_corpus_is_refused(
    recipe: dict[str, ModuleType], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--systems", "dense"]
    assert recipe["run"].main(words) == 0
    assert recipe["run"].main([*words, "--epochs", "3"]) == 1
    assert "come from 1 epochs, not 3" in capsys.readouterr().err
    (recipe["plan"].HERE / "results.json").unlink()
    (recipe["plan"].HERE / "details.json").unlink()
    assert recipe["run"].main([*words, "--epochs", "3"]) == 1
    assert "another configuration" in capsys.readouterr().err
    results = recipe["results"].Results(tmp_path)
    row = {"system": "dense", "condition": "c", "seed": 0, "test_set": "test"}
    results.add_run([row], "s", {"words": [1, 2]}, {})
    with pytest.raises(Exception, match="not what earlier runs were tested on"):
        results.add_run([row | {"seed": 1}], "s", {"words": [1, 3]}, {})


def test_differences_are_of_macro_rates_of_common_seeds(recipe: dict[str, ModuleType], tmp_path: Path) -> None:
    """By hand: two languages of 10 and 20 words; the system makes 1 and 4 errors less, in each of two seeds."""
    results = recipe["results"].Results(tmp_path)
    utterances = {"codes": ["en", "fr"], "languages": [0, 1, 1], "words": [10, 10, 10], "characters": [50, 50, 50]}
    for system, errors in (("dense", [5, 6, 8]), ("mole", [4, 4, 6])):
        for seed in (0, 1):
            row = {"system": system, "condition": "prompts5-full", "seed": seed, "test_set": "test", "language": "all"}
            found = {"word_errors": errors, "character_errors": errors}
            results.add_run([row], "prompts5-test", utterances, found)
    extra = {"system": "mole", "condition": "prompts5-full", "seed": 2, "test_set": "test", "language": "all"}
    results.add_run([extra], "prompts5-test", utterances, {"word_errors": [10, 10, 10], "character_errors": [9, 9, 9]})
    difference = recipe["tables"].compare(results, "prompts5-full", "mole", "dense")["wer"]
    assert difference.value == pytest.approx(-(10 + 20) / 2)
    assert difference.interval[1] < 0
    assert recipe["tables"].compare(results, "prompts5-full", "dense", "dense") is None


def test_monolingual_models_hear_their_language_only(recipe: dict[str, ModuleType], data: Path, tmp_path: Path) -> None:
    words = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--systems", "monolingual", "--results"]
    assert recipe["run"].main([*words, str(tmp_path)]) == 0
    folders = tmp_path / "runs" / "prompts5-full" / "monolingual" / "seed0"
    assert [json.loads((folders / code / "model" / "languages.json").read_text()) for code in LANGUAGES] == [
        [code] for code in LANGUAGES
    ]
    rows = rows_of(tmp_path)
    assert all(row["language_id_accuracy"] is None for row in rows)
    assert rows[0]["total_parameters"] == 5 * rows[0]["active_parameters"]


def encoder_of(name: str) -> EncoderConfig:
    """The encoder that the files of the recipe describe, as `fit` would lay one over the other."""
    base, over = (yaml.safe_load((RECIPE / f).read_text())["model"]["encoder"] for f in ("base.yaml", name))
    values = base | over
    return EncoderConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def test_all_systems_have_as_many_active_parameters() -> None:
    counts = {}
    for path in sorted((RECIPE / "systems").glob("*.yaml")):
        counts[path.stem] = count_parameters(MoleModel(encoder_of(f"systems/{path.name}"), LANGUAGES, 73))
    assert len(counts) >= 15
    for name, count in counts.items():
        assert count.active == pytest.approx(counts["dense"].active, rel=0.003), name
    assert counts["dense"].total == counts["dense"].active < counts["mole-family"].total < counts["mole"].total
