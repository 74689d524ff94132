import importlib.util
import io
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.data_prep import synthetic
from mole_asr.data_prep.synthetic import Reading, choose, prepare, read_aloud
from mole_asr.errors import MoleError

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed (apt)")
needs_pico = pytest.mark.skipif(importlib.util.find_spec("py_nanotts") is None, reason="py-nanotts is not installed")
LISTING = "Pty Language Age/Gender VoiceName File\n" + "\n".join(
    f" 5  {code}  --/M  name  file" for code in ("it", "en-gb", "en-us", "fr-fr", "ru")
)
TEXTS = [("ru", "да"), ("it", "uno due"), ("eo", "jes"), ("ru", ""), ("ru", "xyz"), ("ru", "да")]


def manifest(folder: Path, texts: Sequence[tuple[str, str]] = TEXTS) -> Path:
    path = folder / "cuts_train.jsonl"
    rows = (Utterance(f"u{n}", folder / "x.wav", 0, 1, 16000, text, code) for n, (code, text) in enumerate(texts))
    write_manifest(rows, path)
    return path


def rows(output: Path) -> list[Utterance]:
    found = Manifest(output / "cuts_train.jsonl")
    return [found[row] for row in range(len(found))]


@pytest.fixture
def fake_espeak(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An espeak-ng whose speech is the longer the longer the text, and that cannot read `xyz`; returns what it read."""
    texts: list[str] = []

    def run(program: Sequence[str], input: bytes = b"", **_: object) -> subprocess.CompletedProcess:
        if "--voices" in program:
            return subprocess.CompletedProcess(program, 0, LISTING, "")
        texts.append(input.decode())
        if texts[-1] == "xyz":
            return subprocess.CompletedProcess(program, 1, b"", b"no such\nthing")
        wav = io.BytesIO()
        soundfile.write(wav, np.full(100 * len(texts[-1]), 0.1, np.float32), 16000, format="WAV")
        return subprocess.CompletedProcess(program, 0, wav.getvalue(), b"")

    monkeypatch.setattr(synthetic.subprocess, "run", run)
    monkeypatch.setattr(synthetic.shutil, "which", lambda _: "/usr/bin/espeak-ng")
    synthetic._espeak_languages.cache_clear()
    yield texts
    synthetic._espeak_languages.cache_clear()


def test_readings_are_labelled_and_what_nobody_reads_is_named(
    fake_espeak: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    result = prepare(manifest(tmp_path), output, copies=2, engines=["espeak-ng"])
    found = rows(output)
    assert result.utterances == {"train": 6} and [line.split(": ")[0] for line in result.failures] == ["u4", "u4"]
    names = [(n, copy) for n in (0, 1, 5) for copy in (1, 2)]
    assert [row.id for row in found] == [f"synthetic-espeak-ng-{copy}-u{n}" for n, copy in names]
    for row, (n, _) in zip(found, names, strict=True):
        assert (row.language, row.text) == TEXTS[n]
        assert row.speaker and row.speaker.startswith(f"synthetic-espeak-ng-{row.language}+")
        assert row.num_samples == soundfile.info(row.audio_path).frames == 100 * len(row.text)
    assert len({row.speaker for row in found}) > 2
    assert {path.name for path in output.glob("cuts_*")} == {"cuts_train.jsonl"}
    listed = [line.split("\t") for line in (output / "left_out.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    assert [(name, reason.split(" with")[0]) for _, name, reason in listed] == [
        ("u2", "no engine speaks the language"),
        ("u3", "no text"),
        ("u4", "espeak-ng cannot read 'xyz'"),
        ("u4", "espeak-ng cannot read 'xyz'"),
    ]
    assert listed[-1][2].endswith(": no such thing")
    printed = capsys.readouterr()
    assert ["ru", "4"] in [line.split()[:2] for line in printed.out.splitlines()]
    head, *skipped = printed.err.splitlines()
    assert head == "2 skipped:" and all(line.startswith("  u4: espeak-ng cannot read 'xyz'") for line in skipped)


def test_a_second_run_reads_only_what_is_missing(fake_espeak: list[str], tmp_path: Path) -> None:
    texts = [("ru", "да"), ("ru", "нет"), ("it", "uno")]
    prepare(manifest(tmp_path, texts), tmp_path / "out", engines=["espeak-ng"])
    first = rows(tmp_path / "out")
    fake_espeak.clear()
    prepare(manifest(tmp_path, texts), tmp_path / "out", engines=["espeak-ng"])
    assert not fake_espeak
    first[1].audio_path.unlink()
    prepare(manifest(tmp_path, [*texts[:2], ("it", "due")]), tmp_path / "out", engines=["espeak-ng"])
    assert sorted(fake_espeak) == ["due", "нет"]  # a changed text is another file
    assert rows(tmp_path / "out")[:2] == first[:2]


def test_the_same_name_gives_the_same_reading_and_many_names_many_voices(fake_espeak: list[str]) -> None:
    readings = [choose(f"u{n}", "it", ["espeak-ng", "pico"]) for n in range(400)]
    assert readings == [choose(f"u{n}", "it", ["espeak-ng", "pico"]) for n in range(400)]
    engines = Counter(reading.engine for reading in readings)
    assert 60 < engines["pico"] < 140
    espeak = [reading for reading in readings if reading.engine == "espeak-ng"]
    assert len({reading.voice for reading in espeak}) > 45
    women = sum(reading.voice.removeprefix("it+") in synthetic._WOMEN for reading in espeak)
    assert 0.4 < women / len(espeak) < 0.6
    for field in ("pitch", "speed"):
        assert len({getattr(reading, field) for reading in espeak}) > 20
    assert {choose(f"u{n}", "en", ["pico"]).voice for n in range(50)} == {"en-US", "en-GB"}
    assert {choose(f"u{n}", "en", ["espeak-ng"]).voice.split("+")[0] for n in range(50)} == {"en-us", "en-gb"}


def test_mistakes_are_named(fake_espeak: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = manifest(tmp_path), tmp_path / "out"
    with pytest.raises(MoleError, match="copies: 0; give 1"):
        prepare(source, output, copies=0)
    with pytest.raises(MoleError, match="would replace the manifest that is read"):
        prepare(source, tmp_path, engines=["espeak-ng"])
    for engines in (["festival"], []):
        with pytest.raises(MoleError, match=r"^engines: .*; choose from espeak-ng, pico"):
            prepare(source, output, engines=engines)
    with pytest.raises(MoleError, match=r"cuts_train\.jsonl: it has no text in a language that espeak-ng speaks"):
        prepare(manifest(tmp_path, [("eo", "jes")]), output, engines=["espeak-ng"])
    with pytest.raises(MoleError, match=r"cannot read 'xyz' with the voice ru\+\w+: no such thing"):
        prepare(manifest(tmp_path, [("ru", "xyz")]), output, engines=["espeak-ng"])
    monkeypatch.setattr(synthetic.shutil, "which", lambda _: None)
    with pytest.raises(MoleError, match="espeak-ng is missing; install it"):
        prepare(source, output, engines=["espeak-ng"])
    monkeypatch.setitem(synthetic.sys.modules, "py_nanotts", None)
    with pytest.raises(MoleError, match="py-nanotts is missing; pip install"):
        prepare(source, output, engines=["pico"])


def pitch_hz(audio_S: np.ndarray, rate_hz: int) -> float:
    """Median over voiced frames of the autocorrelation's peak between 60 and 500 Hz."""
    found = []
    for start in range(0, len(audio_S) - 2048, 1024):
        frame_S = audio_S[start : start + 2048]
        correlation = np.correlate(frame_S, frame_S, "full")[2047:]
        lag = rate_hz // 500 + int(correlation[rate_hz // 500 : rate_hz // 60].argmax())
        if correlation[lag] > 0.5 * correlation[0] > 1:
            found.append(rate_hz / lag)
    return float(np.median(found))


@needs_espeak
def test_espeak_obeys_voice_pitch_and_speed_and_repeats_itself() -> None:
    text = "buongiorno a tutti noi siamo qui"
    low_S, rate_hz = read_aloud(text, Reading("espeak-ng", "it+m3", 30, 150))
    again_S, _ = read_aloud(text, Reading("espeak-ng", "it+m3", 30, 150))
    assert np.array_equal(low_S, again_S) and np.abs(low_S).max() > 0.2
    high_S, _ = read_aloud(text, Reading("espeak-ng", "it+f2", 70, 150))
    assert pitch_hz(high_S, rate_hz) > 1.4 * pitch_hz(low_S, rate_hz)
    fast_S, _ = read_aloud(text, Reading("espeak-ng", "it+m3", 30, 190))
    assert len(fast_S) < 0.9 * len(low_S)
    with pytest.raises(MoleError, match="espeak-ng cannot read"):
        read_aloud(text, Reading("espeak-ng", "xx", 50, 150))


@needs_espeak
def test_espeak_has_every_voice_that_may_be_drawn() -> None:
    listing = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    variants = {line.split("!v/")[1].split()[0] for line in listing.splitlines()[1:]}
    assert set(synthetic._MEN + synthetic._WOMEN) <= variants
    for language, accents in synthetic._ACCENTS.items():
        assert synthetic._voices("espeak-ng", language) == accents


@needs_pico
def test_pico_obeys_pitch_and_speed_and_repeats_itself() -> None:
    text = "buongiorno a tutti noi siamo qui"
    low_S, rate_hz = read_aloud(text, Reading("pico", "it-IT", 80, 90))
    again_S, _ = read_aloud(text, Reading("pico", "it-IT", 80, 90))
    assert rate_hz == 16000 and np.array_equal(low_S, again_S) and np.abs(low_S).max() > 0.2
    high_S, _ = read_aloud(text, Reading("pico", "it-IT", 120, 120))
    assert pitch_hz(high_S, rate_hz) > 1.25 * pitch_hz(low_S, rate_hz)
    assert len(high_S) < 0.9 * len(low_S)
    with pytest.raises(MoleError, match="pico cannot read"):
        read_aloud(text, Reading("pico", "xx-XX", 100, 100))
