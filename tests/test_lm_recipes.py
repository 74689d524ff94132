"""recipes/lm_adaptive and recipes/lm_families: their configs, and the whole commands on a few made sentences."""

import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import yaml

from mole_asr.text.cost import token_cost
from mole_asr.text.model import NetworkConfig, TextModel
from mole_asr.text.policies import ExpertsConfig

RECIPES = Path(__file__).parents[1] / "recipes"
MODULES = ("plan", "tables", "pictures", "run")
LETTERS = {"ar": "ابتث", "de": "abcd", "en": "cdef", "es": "efgh", "fr": "ghij", "ru": "жзик", "zu": "klmn"}
NETWORK = {"d_model": 8, "d_ff": 8, "num_layers": 2, "num_heads": 1}
DATA = {"window": 16, "batch_windows": 4, "valid_windows_per_language": 1}
TRAINER = {"precision": "32-true", "accelerator": "cpu"}
OFTEN = {"log_every_n_steps": 1, "val_check_interval": 2}

Recipe = dict[str, ModuleType]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Recipe]]:
    """Makes the modules of a copy of a recipe whose models are tiny."""

    def copy(name: str) -> Recipe:
        folder = tmp_path / "recipes" / name
        shutil.copytree(RECIPES / name, folder, ignore=shutil.ignore_patterns("*.json", "__pycache__", "*.svg"))
        base = yaml.safe_load((folder / "base.yaml").read_text())
        base["model"]["network"] |= NETWORK
        base["data"] |= DATA
        base["trainer"] |= TRAINER | (OFTEN if name == "lm_adaptive" else {})
        (folder / "base.yaml").write_text(yaml.safe_dump(base))
        monkeypatch.syspath_prepend(str(folder))
        return {module: importlib.import_module(module) for module in MODULES}

    yield copy
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Where texts and runs lie: a few sentences in seven languages, each of letters of its own."""
    rng = random.Random(0)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 12), ("dev", 2), ("test", 3)):
        lines = [
            json.dumps({"text": "".join(rng.choices(letters, k=12)), "language": code}, ensure_ascii=False)
            for code, letters in LETTERS.items()
            for _ in range(count)
        ]
        (tmp_path / "data" / f"texts_{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--steps", "4"]


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    return json.loads((recipe["plan"].HERE / "results.json").read_text())


def test_lm_adaptive(
    make: Callable[[str], Recipe], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make("lm_adaptive")
    folder, main = recipe["plan"].HERE, recipe["run"].main
    recipe["run"].ROUNDS = 1
    goes_on = ["continued-top-2", "continued-adaptive"]
    systems = ["--systems", "dense", "top-2", "adaptive-0.4", "adaptive-shuffled", *goes_on]
    assert main([*words, *systems, "--jobs", "2"]) == 0
    table = capsys.readouterr().out.partition("| equal steps")[2]
    rows = rows_of(recipe)
    quality, speed, gates = (
        {row["system"]: row for row in rows if row["kind"] == kind} for kind in ("quality", "speed", "gate")
    )
    assert set(quality) == set(systems[1:]) and set(speed) == set(systems[1:]) - set(goes_on)
    for name in goes_on:
        quality.pop(name)
        config = (tmp_path / "runs" / name / "seed0" / "training.json").read_text()
        assert "adamw_lr: 0.002" in config
    for name, row in quality.items():
        assert set(row["bits"]) == {"de", "en", "es", "fr"} and row["bits_per_byte"] > 0
        assert [point[0] for point in row["curve"]] == [1, 3]
        assert row["curve"][0][2:] < row["curve"][1][2:] and "seconds" in row
        assert len(row["shares"]) == (4 if "adaptive" in name else 0)
        assert speed[name]["step_ms"] > 0 and speed[name]["forward_ms"] > 0
    shuffled = [
        "curriculum=false" in (tmp_path / f"runs/{name}/seed0/training.json").read_text() for name in systems[-4:-2]
    ]
    assert shuffled == [False, True]
    shares = [mean(layer["several_share"] for layer in row["layers"]) for row in gates.values()]
    assert len(gates) == 7 and shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert gates["gate-1"]["bits"] == pytest.approx(quality["top-2"]["bits"], abs=1e-4)
    assert quality["dense"]["feed_forward_flops"] < quality["adaptive-0.4"]["feed_forward_flops"]
    assert quality["dense"]["layers"] == [] and len(quality["top-2"]["layers"]) == 2
    assert table.strip() in (folder / "README.md").read_text()
    assert {path.name for path in folder.glob("*.svg")} == {"curves.svg", "shares.svg"}

    before = (folder / "results.json").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "gone")  # nothing of it is needed: all is done
    assert main([*words, *systems]) == 0
    assert (folder / "results.json").read_bytes() == before
    assert main([*words[:-1], "5", *systems]) == 1
    assert "trained for 4 steps, not 5" in capsys.readouterr().err
    assert main([*words, *systems, "--speed"]) == 1
    assert "holds no model of dense, top-2, adaptive-shuffled, adaptive-0.4, seed 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lm_adaptive", "lm_families"])
def test_a_users_mistake_is_one_line(
    make: Callable[[str], Recipe], words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make(name)
    results = recipe["plan"].HERE / "results.json"
    results.write_text("[{")
    assert recipe["run"].main([*words, "--table"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"run.py: {results}: not JSON") and error.count("\n") == 1


def test_equal_loss_by_hand(make: Callable[[str], Recipe]) -> None:
    tables = make("lm_adaptive")["tables"]
    curve = [[10, 4.0, 1.0, 1.0, 100], [20, 2.0, 2.0, 3.0, 200], [30, 2.5, 3.0, 9.0, 300], [40, 1.0, 4.0, 9.0, 400]]
    assert tables.reached(curve, 3.0) == [15, 3.0, 1.5, 2.0, 150]
    assert tables.reached(curve, 2.0) == curve[1]
    assert tables.reached(curve, 1.75) == [35, 1.75, 3.5, 9.0, 350]
    assert tables.reached(curve, 5.0) == curve[0]
    with pytest.raises(ValueError, match="never"):
        tables.reached(curve, 0.5)


def test_training_flops_follow_the_share_of_two_expert_tokens(make: Callable[[str], Recipe], words: list[str]) -> None:
    """Against a count by hand from the logged shares: three times a forward's work of every token."""
    recipe = make("lm_adaptive")
    recipe["run"].ROUNDS = 1
    assert recipe["run"].main([*words, "--systems", "adaptive"]) == 0
    row = rows_of(recipe)[0]
    experts = ExpertsConfig("adaptive")
    model = TextModel(NetworkConfig(**NETWORK, activation="relu", norm="layer"), [experts], list("abcd"), 258)
    assert [each[0] for each in row["shares"]] == [0, 1, 2, 3]
    for step, _, _, _, flops in row["curve"]:
        shares = [each[1:] for each in row["shares"][: step + 1]]
        per_token = {layer: 1 + sum(each[layer] for each in shares) / len(shares) for layer in (0, 1)}
        assert flops == pytest.approx(3 * (step + 1) * 16 * 4 * token_cost(model, 16, per_token).flops, rel=1e-4)


def test_lm_families(
    make: Callable[[str], Recipe], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make("lm_families")
    folder, main = recipe["plan"].HERE, recipe["run"].main
    conditions = {"12": ["ar", "de", "en", "es", "fr"], "50": [*LETTERS]}
    for name, codes in conditions.items():
        (folder / "conditions" / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"languages": codes}}))
    chosen = {"12": ["post-moe-raw", "all-free"], "50": ["dense", "wide-last2", "post-moe", "families", "all"]}
    commands = [[*words, "--conditions", name, "--systems", *systems] for name, systems in chosen.items()]
    assert [main(command) for command in commands] == [0, 0]
    table = capsys.readouterr().out.rpartition("== ")[2].partition("### ")[2]
    rows = {(row["condition"], row["system"]): row for row in rows_of(recipe)}
    assert set(rows) == {(name, system) for name, systems in chosen.items() for system in ("start", *systems)}
    for (condition, system), row in rows.items():
        assert list(row["bits"]) == conditions[condition]
        assert (row["minor"] is None) == (condition == "12")
        assert [point[0] for point in row["curve"]] == [3], "a short training is validated at its end"
        assert row["own_expert"] is None or all(0 <= share <= 1 for share in row["own_expert"])
        if system not in ("start", "post-moe-raw"):
            assert abs(row["start_shift"]) < 1e-4, "the experts do not start as the dense model"
    assert abs(rows["12", "post-moe-raw"]["start_shift"]) > 1e-4
    # As many active parameters, but for the routers.
    active = {system: row["active_parameters"] for (name, system), row in rows.items() if name == "50"}
    assert active["start"] == active["dense"] < active["wide-last2"]
    for system in ("post-moe", "families", "all"):  # here "last 2" are all layers
        assert active[system] == pytest.approx(active["wide-last2"], abs=2 * 8 * 7)
    total = {system: row["total_parameters"] for (name, system), row in rows.items() if name == "50"}
    assert total["families"] < total["post-moe"] == total["all"]
    assert table.strip() in (folder / "README.md").read_text()
    assert {path.name for path in folder.glob("*.svg")} == {"spread.svg", "languages.svg"}

    before = (folder / "results.json").read_bytes()
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert main(commands[1]) == 0
    assert (folder / "results.json").read_bytes() == before


def test_lm_families_has_twelve_major_and_fifty_languages(make: Callable[[str], Recipe]) -> None:
    from mole_asr.corpus.languages import MAJOR_LANGUAGES

    plan = make("lm_families")["plan"]
    twelve, fifty = (plan.CONDITIONS[name].languages for name in ("12", "50"))
    assert sorted(twelve) == sorted(MAJOR_LANGUAGES)
    assert len(set(fifty)) == len(fifty) == 50 and set(twelve) < set(fifty)
