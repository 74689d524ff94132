"""`bench whisper` with a stand-in for faster-whisper: what is told, written, kept; and with the real one's refusals."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from mole_asr.bench import whisper as module
from mole_asr.bench.whisper import whisper
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.errors import MoleError
from mole_asr.score.score import score

RATE_HZ = 16000
TEXTS = {"u0": "one two", "u1": "zwei", "u2": "three"}


class Peer:
    """Says the right text of a recording, which it knows by its length; counts what it is asked."""

    supported_languages = ("de", "en")

    def __init__(self) -> None:
        self.asked: list[tuple[int, str | None, int]] = []
        self.broken_after = 99

    def transcribe(self, audio_S: np.ndarray, language: str | None, beam_size: int, **options: Any) -> tuple:
        if len(self.asked) == self.broken_after:
            raise KeyboardInterrupt
        assert options == {"condition_on_previous_text": False, "vad_filter": False}
        self.asked.append((len(audio_S), language, beam_size))
        text = TEXTS[f"u{round(10 * len(audio_S) / RATE_HZ) - 2}"]
        all_probs = None if language else [("de", 0.7), ("en", 0.3)]
        info = SimpleNamespace(
            language=language or "de", language_probability=1 if language else 0.7, all_language_probs=all_probs
        )
        return iter([SimpleNamespace(start=0.0, end=0.2, text=f" {text.capitalize()}.")]), info


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three utterances of 0.2, 0.3 and 0.4 s."""
    utterances = []
    for number, (name, text) in enumerate(TEXTS.items()):
        samples = round((0.2 + 0.1 * number) * RATE_HZ)
        soundfile.write(tmp_path / f"{name}.wav", np.full(samples, 0.1, np.float32), RATE_HZ)
        language = "de" if name == "u1" else "en"
        utterances.append(
            Utterance(
                name, tmp_path / f"{name}.wav", 0.0, samples / RATE_HZ, RATE_HZ, text, language, num_samples=samples
            )
        )
    write_manifest(utterances, tmp_path / "cuts.jsonl")
    return tmp_path / "cuts.jsonl"


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Peer:
    stand_in = Peer()
    monkeypatch.setattr(module, "_load", lambda *args: stand_in)
    return stand_in


def run(manifest: Path, **options: Any) -> Any:
    return whisper(str(manifest), str(manifest.parent / "out"), model="unused", **options)


def test_the_result_is_scored_as_ours(manifest: Path, peer: Peer) -> None:
    result = run(manifest, language="given", beam=3)
    assert peer.asked == [(3200, "en", 3), (4800, "de", 3), (6400, "en", 3)]
    scored = score(manifest, manifest.parent / "out" / "cuts.jsonl")
    assert scored.pooled.wer == 0 and not scored.missing
    stats = json.loads((manifest.parent / "out" / "cuts.stats.json").read_text())
    assert stats["audio_s"] == pytest.approx(0.9) and stats["seconds"] == pytest.approx(result.seconds, abs=1e-4)
    assert sorted(path.name for path in (manifest.parent / "out").iterdir()) == ["cuts.jsonl", "cuts.stats.json"]


def test_the_detected_language_is_written(manifest: Path, peer: Peer) -> None:
    run(manifest, limit=2)
    lines = [json.loads(line) for line in (manifest.parent / "out" / "cuts.jsonl").read_text().splitlines()]
    assert [language for _, language, _ in peer.asked] == [None, None]
    assert [line["language"] for line in lines] == ["de", "de"] and lines[0]["reliability"] == 0.7
    assert lines[0]["language_probabilities"] == {"de": 0.7, "en": 0.3}


def test_an_interrupted_run_goes_on(manifest: Path, peer: Peer) -> None:
    peer.broken_after = 2
    with pytest.raises(KeyboardInterrupt):
        run(manifest)
    part = manifest.parent / "out" / "cuts.part.jsonl"
    with part.open("a") as file:
        file.write('{"seconds": 1.0, "transc')  # the line that was being written
    with pytest.raises(MoleError, match="other settings"):
        run(manifest, beam=2)
    peer.broken_after = 99
    run(manifest)
    assert len(peer.asked) == 3
    lines = (manifest.parent / "out" / "cuts.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(TEXTS) and not part.exists()


def test_an_unreadable_recording_is_skipped(manifest: Path, peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    (manifest.parent / "u1.wav").unlink()
    result = run(manifest)
    assert [name for name, _ in result.failures] == ["u1"] and result.files == 2
    assert f"1 skipped:\n  u1: {manifest.parent / 'u1.wav'}" in capsys.readouterr().err


def test_mistakes_are_explained(manifest: Path, peer: Peer) -> None:
    first = Manifest(manifest)[0]
    for language, match in (("xx", "does not know xx"), ("", "names no language")):
        odd = Utterance("o", first.audio_path, 0.0, 0.2, RATE_HZ, "", language, num_samples=3200)
        write_manifest([odd], manifest.parent / "odd.jsonl")
        with pytest.raises(MoleError, match=match):
            run(manifest.parent / "odd.jsonl", language="given")
    with pytest.raises(MoleError, match="overwrite the manifest"):
        whisper(str(manifest), str(manifest.parent), model="unused")


def test_a_missing_package_or_model_is_named(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any] = module._load
) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(MoleError, match=r"mole-asr\[peers\]"):
        load(tmp_path, "int8", 1)
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=None))
    monkeypatch.setitem(sys.modules, "ctranslate2", SimpleNamespace(set_random_seed=None))
    with pytest.raises(MoleError, match=r"model\.bin: no such file"):
        load(tmp_path, "int8", 1)
