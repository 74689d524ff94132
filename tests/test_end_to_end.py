"""The main job on real prompts: prepare, tokenizer, fit, transcribe and score, each through the command line."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr import cli
from mole_asr.audio.read import read_audio
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest

pytestmark = pytest.mark.corpus

LANGUAGES = ("en", "es", "fr", "it", "ru")
# A small model that learns 20 prompts by heart: nothing that helps it to generalise.
FIT = {
    "data.batch_seconds": 10,
    "data.max_seconds": 3,
    "model.spec_augment": "false",
    "model.encoder.d_model": 64,
    "model.encoder.d_ff": 128,
    "model.encoder.num_blocks": 3,
    "model.encoder.num_mole_blocks": 1,
    "model.encoder.language_tokenizer_block": 1,
    "model.encoder.num_heads": 4,
    "model.encoder.kernel_size": 9,
    "model.encoder.dropout": 0.0,
    "model.encoder.num_mels": 40,
    "model.encoder.intermediate_ctc_blocks": "[2]",
    "average_decay": 0.8,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 50,
    "trainer.check_val_every_n_epoch": 25,
    "trainer.gradient_clip_val": 1.0,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
}


def run(*words: str | Path) -> None:
    """Runs a command in this process."""
    assert cli.main([str(word) for word in words]) == 0


def run_anew(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in a new process."""
    command = [sys.executable, "-m", "mole_asr.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)


def pick(manifest: Manifest) -> Iterable[Utterance]:
    """Four short prompts a language."""
    utterances = sorted(manifest, key=lambda utterance: utterance.id)
    for language in LANGUAGES:
        short = [
            u for u in utterances if u.language == language and 0.8 < u.duration_s < 1.8 and 5 <= len(u.text) <= 20
        ]
        yield from short[:4]


@pytest.fixture(scope="module")
def folder(prompt_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `cuts.jsonl` (20 prompts), `run/model` (a model that knows them by heart) and its tokenizer."""
    folder = tmp_path_factory.mktemp("end_to_end")
    run("prepare", "prompts", folder / "corpus", "--source", prompt_packages)
    assert write_manifest(pick(Manifest(folder / "corpus" / "cuts_train.jsonl")), folder / "cuts.jsonl") == 20
    words = ["--vocab-size", "200", "--model-type", "char", "--byte-fallback", "false"]
    run("tokenizer", "train", folder / "cuts.jsonl", folder / "tokenizer", *words)
    data = {"train_manifest": "cuts.jsonl", "valid_manifest": "cuts.jsonl", "tokenizer": "tokenizer"}
    keys = {"output": folder / "run", **{f"data.{key}": folder / name for key, name in data.items()}, **FIT}
    run("fit", *(f"--{key}={value}" for key, value in keys.items()))
    return folder


@pytest.fixture(scope="module")
def prompt(folder: Path) -> Utterance:
    return Manifest(folder / "cuts.jsonl")[0]


def test_twenty_prompts_are_learnt_by_heart(folder: Path) -> None:
    """Model folder, new process, transcripts, score: no error in 20 prompts of five languages."""
    cuts, found = folder / "cuts.jsonl", folder / "transcripts" / "cuts.jsonl"
    shown = run_anew("transcribe", cuts, "--model", folder / "run" / "model", "--output", found.parent)
    assert "20 recordings" in shown.stderr
    table = run_anew("score", cuts, found, "--by", "language", "--output", folder / "score.json").stdout
    assert all(f"\n{language} " in table for language in (*LANGUAGES, "macro"))
    result = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    assert result["macro"]["cer"] == result["macro"]["wer"] == 0, table
    assert set(result["languages"]) == set(LANGUAGES)
    assert all(language["utterances"] == 4 for language in result["languages"].values())
    assert result["macro"]["language_id_accuracy"] == 100
    assert not result["missing"]


def test_every_format_of_one_file(folder: Path, prompt: Utterance, tmp_path: Path) -> None:
    formats = ("txt", "json", "srt", "vtt", "tsv", "ctm")
    words = ("--model", folder / "run" / "model", "--format", ",".join(formats), "--output", tmp_path)
    shown = run_anew("transcribe", prompt.audio_path, *words)
    assert f"[{prompt.language}]: {prompt.text}\n" in shown.stdout
    text = {name: (tmp_path / f"{prompt.audio_path.stem}.{name}").read_text(encoding="utf-8") for name in formats}
    assert text["txt"] == f"{prompt.text}\n"
    assert text["vtt"].startswith("WEBVTT") and "-->" in text["srt"] and prompt.text in text["srt"]
    assert text["tsv"].splitlines()[1].endswith(f"\t{prompt.text}")
    assert [line.split()[4] for line in text["ctm"].splitlines()] == prompt.text.split()
    result = json.loads(text["json"])
    assert (result["text"], result["language"]) == (prompt.text, prompt.language)
    assert result["duration_s"] == pytest.approx(prompt.duration_s, abs=0.01)
    assert sum(result["language_probabilities"].values()) == pytest.approx(1, abs=5e-4)  # of five rounded ones
    assert set(result["language_probabilities"]) == set(LANGUAGES) and 0.5 < result["reliability"] <= 1
    words = [word for segment in result["segments"] for word in segment["words"]]
    times = [time for word in words for time in (word["start_s"], word["end_s"])]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= prompt.duration_s
    assert all(0.5 < word["confidence"] <= 1 for word in words)


def transcribe(audio: Path, folder: Path, output: Path, *words: str) -> dict:
    run("transcribe", audio, "--model", folder / "run" / "model", "--format", "json", "--output", output, *words)
    return json.loads((output / f"{audio.stem}.json").read_text(encoding="utf-8"))


def test_a_given_language_is_taken(folder: Path, prompt: Utterance, tmp_path: Path) -> None:
    for language in (prompt.language, "ru"):
        result = transcribe(prompt.audio_path, folder, tmp_path, "--language", language)
        assert result["language"] == language
    # Told a wrong language, it still says what it heard, and that the expert is not to be relied on.
    assert max(result["language_probabilities"], key=result["language_probabilities"].get) == prompt.language
    assert result["reliability"] < 0.5


@pytest.mark.parametrize(
    ("name", "rate_hz", "make", "exact"),
    [
        ("stereo.wav", 16000, lambda x_S: np.stack([x_S, x_S], 1), True),
        ("soft.flac", 16000, lambda x_S: 0.1 * x_S, True),
        ("studio.flac", 48000, lambda x_S: np.stack([x_S, x_S], 1), True),
        ("telephone.wav", 8000, lambda x_S: x_S, False),
    ],
)
def test_copies_at_other_rates_and_channel_counts(
    folder: Path,
    prompt: Utterance,
    tmp_path: Path,
    name: str,
    rate_hz: int,
    make: Callable[[np.ndarray], np.ndarray],
    exact: bool,
) -> None:
    soundfile.write(tmp_path / name, make(read_audio(prompt.audio_path, rate_hz)), rate_hz)
    result = transcribe(tmp_path / name, folder, tmp_path)
    assert result["duration_s"] == pytest.approx(prompt.duration_s, abs=0.01)
    assert result["language"] in LANGUAGES
    if exact:  # 8 kHz took away half of the bands that the model knows by heart
        assert (result["text"], result["language"]) == (prompt.text, prompt.language)


def test_the_report_of_the_run(folder: Path, tmp_path: Path) -> None:
    cuts = folder / "cuts.jsonl"
    run("transcribe", cuts, "--model", folder / "run" / "model", "--output", tmp_path)
    logs = ("--logs", folder / "run" / "logs", "--model", folder / "run" / "model")
    run("report", cuts, tmp_path / "cuts.jsonl", tmp_path / "report", *logs, "--seconds", "12")
    figures = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert figures["macro"]["cer"] == 0 and figures["seconds"] == 12
    assert {*figures["languages"]} == set(LANGUAGES)
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<html" in html and "http://" not in html.replace("http://www.w3.org", "")
