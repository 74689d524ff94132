"""recipes/moefy and recipes/factor: the whole commands on a few made sentences and noise."""

import argparse
import dataclasses
import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mole_asr.errors import MoleError
from mole_asr.moe.experts import Activation
from mole_asr.score.results import ResultFile
from mole_asr.text.checkpoint import load_text_model

RECIPES = Path(__file__).parents[2] / "recipes"
MODULES = ("plan", "tables", "pictures", "run")
LANGUAGES = {"de": "abcd", "en": "cdef", "fr": "ghij"}

Recipe = dict[str, ModuleType]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Recipe]]:
    """Makes the modules of a copy of a recipe whose models are tiny."""

    def copy(name: str) -> Recipe:
        for each in ("moefy", "factor"):
            shutil.copytree(
                RECIPES / each, tmp_path / each, ignore=shutil.ignore_patterns("*.json", "__pycache__", "*.svg")
            )
        path = tmp_path / "moefy" / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["model"]["network"] |= {"d_model": 8, "d_ff": 32, "num_layers": 2, "num_heads": 1}
        config["data"] |= {"window": 16, "batch_windows": 4, "valid_windows_per_language": 1}
        config["data"]["languages"] = list(LANGUAGES)
        config["trainer"] |= {"precision": "32-true", "accelerator": "cpu", "val_check_interval": 2}
        config["trainer"]["enable_progress_bar"] = False
        path.write_text(yaml.safe_dump(config))
        laid_over = tmp_path / "factor" / "config.yaml"
        laid_over.write_text(laid_over.read_text().replace("d_ff: 512", "d_ff: 32"))
        monkeypatch.syspath_prepend(str(tmp_path / name))
        return {module: importlib.import_module(module) for module in MODULES}

    yield copy
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def words(tmp_path: Path, speech: Path) -> list[str]:
    """Where texts, recordings and runs lie."""
    rng = random.Random(0)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 20), ("dev", 2), ("test", 8)):
        lines = [
            json.dumps({"text": "".join(rng.choices(letters, k=12)), "language": code})
            for code, letters in LANGUAGES.items()
            for _ in range(count)
        ]
        (tmp_path / "data" / f"texts_{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for split in ("train", "test"):
        (speech / f"cuts_{split}.jsonl").write_bytes((speech / "cuts.jsonl").read_bytes())
    places = {"--data": tmp_path / "data", "--runs": tmp_path / "runs", "--speech": speech / "model"}
    places |= {"--speech-data": speech}
    return [*(str(word) for pair in places.items() for word in pair), "--steps", "3", "--rows", "200"]


def shrink(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, activations: dict[str, Activation]) -> None:
    """Words of the small models, and speed measured on few rows once."""
    for name, activation in activations.items():
        model = dataclasses.replace(recipe["plan"].MODELS[name], words=(f"--model.network.activation={activation}",))
        monkeypatch.setitem(recipe["plan"].MODELS, name, model)
    monkeypatch.setattr("mole_asr.convert.speed.ROWS", 64)


def test_moefy(
    make: Callable[[str], Recipe],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make("moefy")
    shrink(recipe, monkeypatch, {"swiglu": "swiglu"})
    monkeypatch.setattr(recipe["plan"], "SPLITS", ("coactivation",))
    for name, values in {"ROUTERS": ("oracle", "mlp"), "SHARES": (0.25,), "ROUNDS": 1}.items():
        monkeypatch.setattr(recipe["run"], name, values)
    main, folder = recipe["run"].main, tmp_path / "moefy"
    words = [*words, "--training", "2", "100", "--models", "swiglu", "swiglu-adapted", "speech"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    rows = json.loads((folder / "results.json").read_text())
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["model"]] = counts.get(row["model"], 0) + 1
    # A dense row; of eight and of four slices two routers of one split, and one that is tuned.
    assert counts == dict.fromkeys(("swiglu", "swiglu-adapted", "speech"), 7)
    dense = {row["model"]: row for row in rows if row["router"] == "dense"}
    assert dense["swiglu"]["silent_share"] == dense["speech"]["silent_share"] == 0
    assert dense["swiglu-adapted"]["silent_share"] > 0.05
    for row in rows:
        if row["router"] != "dense":
            assert row["share"] == row["active"] / row["slices"] and row["speed_up"] > 0 < row["model_speed_up"]
            assert 0 < row["output_error"] < 2 and ("cer" in row) == row["model"].startswith("speech")
    for name in ("swiglu", "swiglu-adapted"):  # the oracle leaves out less
        mine = {
            (row["split"], row["router"], row["active"]): row["mass_kept"]
            for row in rows
            if (row["model"], row["slices"], row["tuned"]) == (name, 8, 0)
        }
        for (split, router, active), value in mine.items():
            assert router == "dense" or value <= mine[split, "oracle", active] + 1e-4
    assert "| mlp, tuned 2 steps | coactivation |" in shown
    readme = (folder / "README.md").read_text()
    assert "| text, SwiGLU, 8 slices | router |" in shown and "| coactivation | mlp |" in readme
    assert (folder / "quality.svg").exists() and (folder / "speed.svg").exists()
    assert load_text_model(tmp_path / "runs/swiglu/model").model.config.activation == "swiglu"
    before = (folder / "results.json").read_bytes()
    assert main(words) == 0  # what is done stays done
    assert (folder / "results.json").read_bytes() == before
    assert main(["--table", "--results", str(folder)]) == 0
    settings = {"seed": 0, "cut_rows": 200, "test_rows": 200, "training_rows": 100}
    for row in rows:
        text, adapted = row["model"].startswith("swiglu"), row["model"].endswith("adapted")
        mine = settings | ({"model_steps": 3} if text else {}) | ({"adaptation_steps": 2} if adapted else {})
        assert {name: row[name] for name in mine} == mine
    for changed, says in (
        (["--seeds", "1"], "seed 0, not 1"),
        (["--steps", "4"], "model_steps 3, not 4"),
        (["--rows", "300"], "cut_rows 200, not 300"),
        (["--training", "2", "90"], "training_rows 100, not 90"),
        (["--training", "3", "100", "--models", "swiglu-adapted"], "adaptation_steps 2, not 3"),
    ):
        assert main([*words, *changed]) == 1
        assert f"its rows of swiglu{'-adapted' * ('3' in changed)} come from {says}" in capsys.readouterr().err
    assert (folder / "results.json").read_bytes() == before
    for wrong in (["--rows", "0"], ["--training", "0", "100"]):
        with pytest.raises(SystemExit):
            main([*words, *wrong])
        assert "must be at least 1" in capsys.readouterr().err


def test_quality_kept_is_absent_without_the_model_that_was_adapted(
    make: Callable[[str], Recipe], tmp_path: Path
) -> None:
    tables = make("moefy")["tables"]
    results = ResultFile(tmp_path / "results.json", ("model", "router"))
    cut = {"model": "swiglu-adapted", "router": "mlp", "score": 0.3}
    results.add([cut, {"model": "swiglu-adapted", "router": "dense", "score": 0.4}])
    assert tables.kept(results, cut) is None  # what it was adapted from is not measured
    results.add([{"model": "swiglu", "router": "dense", "score": 0.5}])
    assert tables.kept(results, cut) == 0.6


def test_the_rows_that_stand_in_moefy_may_be_added_to(make: Callable[[str], Recipe], tmp_path: Path) -> None:
    recipe = make("moefy")
    shutil.copy(RECIPES / "moefy" / "config.yaml", tmp_path / "moefy" / "config.yaml")
    results = ResultFile(RECIPES / "moefy" / "results.json", recipe["run"].KEY)
    options = argparse.Namespace(device="cpu", seeds=[0], steps=None, rows=None, training=None)
    for model in recipe["plan"].MODELS.values():
        recipe["run"].check_rows(model, options, results)
    options.rows = 30_000
    with pytest.raises(MoleError, match="rows of relu come from cut_rows 20000, not 30000"):
        recipe["run"].check_rows(recipe["plan"].MODELS["relu"], options, results)


def test_moefy_without_a_recogniser(
    make: Callable[[str], Recipe], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make("moefy")
    assert recipe["run"].main([*words, "--models", "speech", "--speech", str(tmp_path / "none")]) == 0
    assert "speech: left out" in capsys.readouterr().out


def test_factor(
    make: Callable[[str], Recipe],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make("factor")
    shrink(recipe, monkeypatch, {})
    ways = [way for way in recipe["plan"].WAYS if way.active == 1 and way.split in ("random", "clusters")]
    for module in ("run", "tables", "pictures"):
        monkeypatch.setattr(recipe[module], "WAYS", ways)
    monkeypatch.setattr(recipe["run"], "ROUNDS", 1)
    main, folder = recipe["run"].main, tmp_path / "factor"
    words = [*words, "--tuning-steps", "3", "--models", "swiglu"]
    assert main(words) == 0
    network = load_text_model(tmp_path / "runs" / "swiglu" / "model").model.config
    assert network.activation == "swiglu" and network.d_ff == 32
    rows = json.loads((folder / "results.json").read_text())
    assert [row["router"] for row in rows if row["model"] == "swiglu"] == [
        "dense",
        "oracle",
        "prior",
        "end_to_end",
        "untrained",
        "prior",
    ]
    for row in rows:
        if row["router"] != "dense":
            assert row["share"] == 0.25 and row["steps"] == 3 and row["speed_up"] > 0
    shown = capsys.readouterr().out
    assert "| 1R4E1K | random | end to end | 25 % |" in shown
    assert "1R4E1K" in (folder / "README.md").read_text() and (folder / "quality.svg").exists()
    before = (folder / "results.json").read_bytes()
    assert main(words) == 0  # what is done stays done
    assert (folder / "results.json").read_bytes() == before
    assert {row["model_steps"] for row in rows} == {row["steps"] for row in rows} == {3}
    for changed, says in (
        ("--seeds", "seed 0, not 1"),
        ("--rows", "rows 200, not 1"),
        ("--tuning-steps", "steps 3, not 1"),
    ):
        assert main([*words, changed, "1"]) == 1
        assert f"its rows of swiglu come from {says}" in capsys.readouterr().err
    rows[0]["score"] = 0.123  # of the dense model, whose row stays as it is where a cut is missing
    (folder / "results.json").write_text(json.dumps(rows[:-1]))
    assert main(words) == 0
    again = json.loads((folder / "results.json").read_text())
    assert again[:-1] == rows[:-1] and again[-1]["split"] == rows[-1]["split"]
