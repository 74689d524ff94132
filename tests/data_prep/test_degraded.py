from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.data_prep import degraded
from mole_asr.errors import MoleError

RATE_HZ = 16000


def tone(frequency_hz: float, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * frequency_hz * np.arange(RATE_HZ) / RATE_HZ)).astype(np.float32)


def power(audio_S: np.ndarray) -> float:
    return float(np.mean(np.square(audio_S[1000:-1000], dtype=np.float64)))


def corpus(folder: Path, count: int = 6) -> Path:
    """Utterances of one second, each the second half of a file; each has a tone of its own."""
    utterances = []
    for number in range(count):
        path = folder / f"{number}.flac"
        soundfile.write(path, np.concatenate([np.zeros(RATE_HZ, np.float32), tone(300 + 250 * number)]), RATE_HZ)
        utterances.append(Utterance(f"u/{number}", path, 1.0, 1.0, RATE_HZ, f"text {number}", "en", "me", 2 * RATE_HZ))
    write_manifest(utterances, folder / "cuts_test.jsonl")
    return folder / "cuts_test.jsonl"


def audio(manifest: Manifest, row: int) -> np.ndarray:
    utterance = manifest[row]
    return utterance.read()


@pytest.mark.parametrize("kind", ["noise", "telephone"])
def test_a_copy_says_the_same_in_other_sound(tmp_path: Path, kind: str) -> None:
    source = corpus(tmp_path)
    degraded.prepare(source, tmp_path / "copy" / "cuts.jsonl", kind)
    clean, copy = Manifest(source), Manifest(tmp_path / "copy" / "cuts.jsonl")
    assert len(copy) == len(clean)
    for row in range(len(clean)):
        before, after = clean[row], copy[row]
        assert (before.id, before.text, before.language, before.speaker) == (
            after.id,
            after.text,
            after.language,
            after.speaker,
        )
        assert (after.start_s, after.duration_s, after.num_samples) == (0.0, 1.0, RATE_HZ)
        assert len(audio(copy, row)) == RATE_HZ
        assert not np.allclose(audio(copy, row), audio(clean, row), atol=1e-3)


def test_noise_is_5_to_15_db_below_the_speech_and_has_voices_in_it(tmp_path: Path) -> None:
    source = corpus(tmp_path, 12)
    degraded.prepare(source, tmp_path / "noisy.jsonl", "noise")
    clean, noisy = Manifest(source), Manifest(tmp_path / "noisy.jsonl")
    others = np.array([300 + 250 * number for number in range(12)])
    snrs_db = []
    for row in range(12):
        noise_S = audio(noisy, row) - audio(clean, row)
        snrs_db.append(10 * np.log10(power(audio(clean, row)) / power(noise_S)))
        # Each voice is a tone: at three to six of their frequencies, never its own, the noise stands out.
        spectrum = np.abs(np.fft.rfft(noise_S)) ** 2
        loud = spectrum[others] > 50 * np.median(spectrum[200:3300])
        assert not loud[row] and 3 <= loud.sum() <= 6
    assert min(snrs_db) > 4 and max(snrs_db) < 16
    assert max(snrs_db) - min(snrs_db) > 4


def test_the_same_id_gives_the_same_file(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    for kind in ("noise", "telephone"):
        for name in ("a", "b"):
            degraded.prepare(source, tmp_path / f"{kind}{name}.jsonl", kind)
        first, second = (Manifest(tmp_path / f"{kind}{name}.jsonl") for name in ("a", "b"))
        assert all(np.array_equal(audio(first, row), audio(second, row)) for row in range(len(first)))


@pytest.mark.parametrize("law", ["ULAW", "ALAW"])
def test_a_telephone_keeps_its_band_and_hears_soft_sounds(law: str) -> None:
    for frequency_hz in (350, 1000, 3000):
        assert power(degraded.telephone_line(tone(frequency_hz), law)) == pytest.approx(power(tone(1000)), rel=0.15)
    for frequency_hz in (100, 3800, 5000):
        assert power(degraded.telephone_line(tone(frequency_hz), law)) < 1e-3 * power(tone(1000))
    # G.711 keeps 30 dB and more between signal and coding noise over 30 dB of level; 8 linear bits would lose it.
    for level in (0.3, 0.03, 0.01):
        error_S = degraded.telephone_line(tone(1000, level), law) - tone(1000, level)
        assert 30 < 10 * np.log10(power(tone(1000, level)) / power(error_S)) < 50


def test_the_two_laws_differ_and_keep_the_length() -> None:
    odd_S = tone(1000)[:15999]
    coded = [degraded.telephone_line(odd_S, law) for law in ("ULAW", "ALAW")]
    assert [len(coded_S) for coded_S in coded] == [15999, 15999]
    assert not np.array_equal(*coded)


def test_mistakes_are_named(tmp_path: Path) -> None:
    source = corpus(tmp_path, 1)
    with pytest.raises(MoleError, match="'nois' is unknown; choose from noise, telephone"):
        degraded.prepare(source, tmp_path / "a.jsonl", "nois")
    with pytest.raises(MoleError, match=r"out: name the manifest to write, such as .*out\.jsonl"):
        degraded.prepare(source, tmp_path / "out", "noise")
    with pytest.raises(MoleError, match="1 can be read; give more"):
        degraded.prepare(source, tmp_path / "a.jsonl", "noise")
    with pytest.raises(MoleError, match="would replace"):
        degraded.prepare(source, source, "telephone")
    (tmp_path / "sub").mkdir()
    with pytest.raises(MoleError, match="would replace"):
        degraded.prepare(source, tmp_path / "sub" / ".." / source.name, "telephone")
    first = Manifest(source)[0]
    (tmp_path / "speech").mkdir()
    (tmp_path / "0.flac").rename(tmp_path / "speech" / "u_0.wav")
    write_manifest([replace(first, audio_path=tmp_path / "speech" / "u_0.wav")], tmp_path / "one.jsonl")
    with pytest.raises(
        MoleError, match=r"speech/u_0\.wav: is a recording of .*one\.jsonl, and a copy would replace it"
    ):
        degraded.prepare(tmp_path / "one.jsonl", tmp_path / "speech.jsonl", "telephone")
    write_manifest([first, replace(first, id="u_0")], tmp_path / "two.jsonl")
    with pytest.raises(MoleError, match="the ids 'u/0' and 'u_0' name one file"):
        degraded.prepare(tmp_path / "two.jsonl", tmp_path / "a.jsonl", "telephone")
    with pytest.raises(MoleError, match=r"none\.jsonl"):
        degraded.prepare(tmp_path / "none.jsonl", tmp_path / "a.jsonl", "telephone")


@pytest.mark.parametrize("kind", ["noise", "telephone"])
def test_what_cannot_be_read_is_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source = corpus(tmp_path)
    (tmp_path / "2.flac").write_bytes(b"broken")
    soundfile.write(tmp_path / "4.flac", tone(300)[: RATE_HZ // 2].repeat(3), RATE_HZ)  # 1.5 s of 2: it is cut short
    result = degraded.prepare(source, tmp_path / "copy.jsonl", kind)
    assert result.utterances == {kind: 4} and len(result.failures) == 2
    assert f"2 skipped:\n  u/2: {tmp_path / '2.flac'}" in capsys.readouterr().err
    assert [utterance.id for utterance in Manifest(tmp_path / "copy.jsonl")] == ["u/0", "u/1", "u/3", "u/5"]
    for number in range(6):
        (tmp_path / f"{number}.flac").write_bytes(b"broken")
    with pytest.raises(MoleError, match="no readable utterance; u/0: "):
        degraded.prepare(source, tmp_path / "copy.jsonl", kind)
    assert len(Manifest(tmp_path / "copy.jsonl")) == 4, "what was there stays"
