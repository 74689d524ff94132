import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.data_prep.clips import Clip, decode, store, wav_samples
from mole_asr.errors import MoleError


def tone(rate_hz: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def test_a_clip_becomes_a_16_khz_wav_file_and_an_utterance(tmp_path: Path) -> None:
    clip = Clip("fr", "a/b", "L'ÉTÉ, 2.", lambda: (tone(11025), 11025), "me")
    utterance = store(clip, tmp_path / "deep" / "a.wav", "x-1")
    audio_S, rate_hz = soundfile.read(tmp_path / "deep" / "a.wav", dtype="float32")
    assert rate_hz == 16000
    assert (utterance.num_samples, utterance.duration_s) == (len(audio_S), len(audio_S) / 16000)
    assert (utterance.id, utterance.text, utterance.language, utterance.speaker) == ("x-1", "l'été deux", "fr", "me")
    np.testing.assert_allclose(audio_S[200:-200], tone(16000)[200 : len(audio_S) - 200], atol=2e-3)


def test_loud_samples_are_clipped_not_wrapped(tmp_path: Path) -> None:
    store(Clip("fr", "a", "a", lambda: (np.float32([1.5, -1.5, 1.0, 0.25]), 16000)), tmp_path / "a.wav", "a")
    assert soundfile.read(tmp_path / "a.wav", dtype="int16")[0].tolist() == [32767, -32768, 32767, 8192]


def test_a_stored_recording_is_not_decoded_again_unless_it_is_broken(tmp_path: Path) -> None:
    reads: list[int] = []

    def read() -> tuple[np.ndarray, int]:
        reads.append(1)
        return tone(16000), 16000

    clip, path = Clip("fr", "a", "a", read), tmp_path / "a.wav"
    first = store(clip, path, "a")
    assert store(clip, path, "a") == first and len(reads) == 1
    path.write_bytes(path.read_bytes()[:-2])
    assert wav_samples(path) is None
    assert store(clip, path, "a") == first and len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"RIFF", bytes(44), bytes(100)])
def test_what_is_no_wav_file_of_ours_has_no_samples(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    assert wav_samples(tmp_path / "a.wav") is None


def test_fold_accents() -> None:
    assert Clip("es", "a", "El niño", lambda: (tone(16000), 16000), fold_accents=True).spoken == "el nino"
    assert Clip("es", "a", None, lambda: (tone(16000), 16000)).spoken == ""


@pytest.mark.parametrize(("file_format", "rate_hz"), [("WAV", 16000), ("OGG", 44100), ("MP3", 11025)])
def test_decode(file_format: str, rate_hz: int) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([tone(rate_hz), tone(rate_hz)], axis=1), rate_hz, format=file_format)
    audio_S, found_hz = decode(buffer.getvalue(), "x")
    assert found_hz == rate_hz and audio_S.dtype == np.float32
    assert abs(len(audio_S) - len(tone(rate_hz))) < 0.15 * rate_hz
    assert np.abs(audio_S).max() == pytest.approx(0.5, abs=0.1)


def test_a_broken_recording_is_named() -> None:
    with pytest.raises(MoleError, match=r"^pack\.deb: x\.ogg: .*fetch"):
        decode(b"OggS nonsense", "pack.deb: x.ogg")
