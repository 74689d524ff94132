"""What the commands of recipes share: trainings that were cut off, settings that differ, and wrong words."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import mole_asr.fit
from mole_asr.asr.fit import FitResult
from mole_asr.errors import MoleError
from mole_asr.score.runs import read_test_texts, recipe_parser, settings_of, train


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text("# Said to people.\nmodel:\n\n  d_model: 8  # wide\n  # more\n")
    return path


def test_settings_are_what_decides(config: Path) -> None:
    places = ["--data.train_texts=a", "--data.train_manifest=b", "--data.tokenizer=c", "--model.init_from=d"]
    decides = ["--model.tokenizer_layer=3", "--data.seed=1"]
    assert settings_of([f"--config={config}", *places, *decides]) == ["model:", "  d_model: 8  # wide", *decides]


class Fit:
    """Stands for a training: takes two seconds of its own clock, and writes a model unless it is cut off."""

    def __init__(self) -> None:
        self.calls, self.now, self.fails, self.skipped = list[list[str]](), 0.0, False, list[str]()

    def __call__(self, words: list[str]) -> FitResult:
        self.calls.append(words)
        self.now += 2
        if self.fails:
            raise KeyboardInterrupt
        folder = Path(words[-1].removeprefix("--output="))
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "model.safetensors").touch()
        return FitResult(self.skipped)


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Fit:
    fit = Fit()
    monkeypatch.setattr(mole_asr.fit, "fit", fit)
    monkeypatch.setattr("mole_asr.score.runs.time.monotonic", lambda: fit.now)
    return fit


def test_a_training_goes_on_and_is_made_once(fit: Fit, config: Path, tmp_path: Path) -> None:
    folder, words = tmp_path / "run", [f"--config={config}", "--data.seed=1"]
    fit.fails = True
    with pytest.raises(KeyboardInterrupt):
        train(folder, words)
    fit.fails = False
    assert train(folder, words) == 4.0  # both attempts
    assert train(folder, words) == 4.0 and len(fit.calls) == 2
    assert fit.calls[1] == [*words, f"--output={folder}"]
    (folder / "model" / "model.safetensors").unlink()
    assert train(folder, words) == 2.0 and len(fit.calls) == 3
    with pytest.raises(MoleError, match="another configuration"):
        train(folder, [words[0], "--data.seed=2"])


def test_no_recipe_measures_a_training_that_lacks_something(fit: Fit, config: Path, tmp_path: Path) -> None:
    fit.skipped = ["u3: gone.wav: no such audio file", "u4: cut short"]
    for _ in range(2):  # nor when it is started again
        with pytest.raises(MoleError, match=r"run: trained without recordings: u3: gone\.wav.* \(of 2\)"):
            train(tmp_path / "run", [f"--config={config}"])


def test_a_killed_training_is_known_by_its_settings(
    fit: Fit, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "run", dict[str, Any]()

    def killed(words: list[str]) -> FitResult:
        seen.update(json.loads((folder / "training.json").read_text()))
        return FitResult([])

    monkeypatch.setattr(mole_asr.fit, "fit", killed)
    train(folder, [f"--config={config}", "--data.seed=1"])
    assert seen["settings"][-1] == "--data.seed=1" and not seen["done"]
    (folder / "training.json").write_text("{")
    with pytest.raises(MoleError, match=r"training\.json: not JSON"):
        train(folder, [f"--config={config}"])


def test_texts_of_the_test_split(tmp_path: Path) -> None:
    lines = [{"text": text, "language": code} for text, code in (("a", "en"), ("b", "de"), ("c", "en"))]
    (tmp_path / "texts_test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert list(read_test_texts(tmp_path, ["en", "de"]).items()) == [("en", ["a", "c"]), ("de", ["b"])]
    with pytest.raises(MoleError, match=r"texts_test\.jsonl: has no text in fr, it"):
        read_test_texts(tmp_path, ["fr", "en", "it"])


@pytest.mark.parametrize(
    ("words", "part"), [("--steps 0", "at least 1"), ("--steps -3", "-3"), ("--seeds 1 x", "'x' is no whole number")]
)
def test_wrong_numbers_are_refused(words: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser: argparse.ArgumentParser = recipe_parser("", tmp_path / "recipes" / "x", "data")
    with pytest.raises(SystemExit):
        parser.parse_args(words.split())
    assert part in capsys.readouterr().err
