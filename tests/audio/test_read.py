import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mole_asr.audio import read
from mole_asr.audio.read import AUDIO_SUFFIXES, _read_soundfile, probe, read_audio, resample
from mole_asr.errors import MoleError

SECONDS = 2.0


def melody(rate_hz: int, seconds: float = SECONDS) -> np.ndarray:
    """A rising tone, 300 to 2500 Hz, with a swelling loudness: every moment differs from every other."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    sweep = np.sin(2 * np.pi * (300 * t + 1100 / seconds * t**2))
    return (0.5 * sweep * (0.3 + 0.7 * np.sin(5 * t) ** 2)).astype(np.float32)


def write_av(path: Path, audio_S: np.ndarray, rate_hz: int, codec: str, format: str | None = None) -> None:
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout="mono")
        pcm = (audio_S * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.sample_rate = rate_hz
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate_hz, frame_size=stream.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def best_correlation(a_S: np.ndarray, b_S: np.ndarray, max_shift: int = 1600) -> tuple[float, int]:
    """Largest normalised correlation over shifts (codecs delay), and the shift in samples."""
    n = min(len(a_S), len(b_S)) - max_shift
    size = 1 << (len(a_S) + len(b_S)).bit_length()
    middle = b_S[max_shift // 2 : max_shift // 2 + n]
    cross = np.fft.irfft(np.fft.rfft(a_S, size) * np.conj(np.fft.rfft(middle, size)), size)[:max_shift]
    shift = int(cross.argmax())
    part = a_S[shift : shift + n]
    return float(part @ middle[: len(part)] / np.linalg.norm(part) / np.linalg.norm(middle)), shift - max_shift // 2


@pytest.mark.parametrize(
    ("name", "rate_hz", "channels"),
    [
        ("a.wav", 16000, 1),
        ("a.wav", 8000, 1),
        ("a.wav", 44100, 1),
        ("a.wav", 48000, 2),
        ("a.wav", 11025, 6),
        ("a.flac", 44100, 2),
        ("a.ogg", 44100, 1),
        ("a.opus", 48000, 2),
        ("a.mp3", 44100, 2),
    ],
)
def test_soundfile_formats(tmp_path: Path, name: str, rate_hz: int, channels: int) -> None:
    path = tmp_path / name
    kwargs = {"format": "OGG", "subtype": "OPUS"} if name.endswith("opus") else {}
    soundfile.write(path, np.repeat(melody(rate_hz)[:, None], channels, axis=1), rate_hz, **kwargs)
    audio_S = read_audio(path)
    assert audio_S.dtype == np.float32
    assert audio_S.ndim == 1
    assert abs(len(audio_S) / 16000 - SECONDS) < 0.1
    correlation, shift = best_correlation(audio_S, melody(16000))
    assert correlation > 0.99
    assert abs(shift) <= (1 if name.endswith(("wav", "flac")) else 1200)
    info = probe(path)
    assert (info.sampling_rate_hz, info.channels) == (rate_hz, channels)
    assert info.duration_s == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize(
    ("name", "rate_hz", "codec"),
    [
        ("a.m4a", 44100, "aac"),
        ("a.webm", 48000, "libopus"),
        ("a.mkv", 16000, "pcm_s16le"),
        ("a.g722", 16000, "g722"),
        ("a.amr", 8000, "libopencore_amrnb"),
    ],
)
def test_pyav_formats(tmp_path: Path, name: str, rate_hz: int, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV cannot write {codec}")
    path = tmp_path / name
    write_av(path, melody(rate_hz), rate_hz, codec)
    audio_S = read_audio(path)
    assert audio_S.dtype == np.float32
    assert abs(len(audio_S) / 16000 - SECONDS) < 0.15
    assert best_correlation(audio_S, melody(16000))[0] > (0.8 if name.endswith("amr") else 0.93)
    info = probe(path)
    assert (info.sampling_rate_hz, info.channels) == (rate_hz, 1)
    assert info.duration_s == pytest.approx(SECONDS, abs=0.15)
    part_S = read_audio(path, start_s=0.5, duration_s=0.75)
    assert abs(len(part_S) - 12000) <= 1
    assert best_correlation(part_S, audio_S[8000:20000])[0] > 0.999


@pytest.mark.parametrize(("rate_hz", "channels"), [(16000, 1), (44100, 2)])
def test_a_part_of_a_file(tmp_path: Path, rate_hz: int, channels: int) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.repeat(melody(rate_hz)[:, None], channels, axis=1), rate_hz)
    part_S = read_audio(path, start_s=0.5, duration_s=1.0)
    assert len(part_S) == 16000
    np.testing.assert_allclose(part_S[100:-100], melody(16000)[8100:23900], atol=2e-3)
    assert len(read_audio(path, start_s=1.5, duration_s=9.0)) == 8000
    assert len(read_audio(path, start_s=1.75)) == 4000


def test_channels_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([melody(16000), np.zeros(32000, np.float32)], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path), melody(16000) / 2, atol=1e-6)


def test_chunks_of_resampling_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    audio_S = melody(44100, 3.0)
    whole_S = resample(audio_S, 44100, 16000)
    monkeypatch.setattr("mole_asr.audio.read._BLOCK_S", 0.7)
    parts_S = resample(audio_S, 44100, 16000)
    assert len(whole_S) == len(parts_S) == 48000
    np.testing.assert_allclose(parts_S, whole_S, atol=1e-6)


def test_resampling_loses_no_last_sample() -> None:
    # 109173 x 640 / 441 = 158437.007, of which float32 makes 158437.
    audio_S = np.random.default_rng(0).standard_normal(110250).astype(np.float32)
    audio_S[109173:] = 0
    resampled_S = resample(audio_S[:109173], 11025, 16000)
    assert len(resampled_S) == 158438
    np.testing.assert_allclose(resampled_S, resample(audio_S, 11025, 16000)[:158438], atol=1e-6)


def test_an_odd_rate_needs_no_huge_kernel() -> None:
    audio_S = resample(melody(22051), 22051, 16000)
    assert abs(len(audio_S) - 32000) <= 32
    assert best_correlation(audio_S, melody(16000))[0] > 0.95


def test_bad_files_are_named_in_one_line(tmp_path: Path) -> None:
    for name, garbage in (("nan", np.nan), ("huge", 1e20)):  # whose power is infinite
        bad_S = melody(16000)
        bad_S[7] = garbage
        soundfile.write(tmp_path / f"{name}.wav", bad_S, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "zero.g722").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is not audio\n" * 50)
    (tmp_path / "noise.m4a").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "folder.wav").mkdir()
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, width=16, height=16, pix_fmt="yuv420p")
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    names = ["nan", "huge", "empty", "zero", "text", "folder", "missing"]
    for name in [*(f"{name}.wav" for name in names), "noise.m4a", "video.mp4", "zero.g722"]:
        with pytest.raises(MoleError) as caught:
            read_audio(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        if name not in ("nan.wav", "huge.wav"):
            with pytest.raises(MoleError, match=name):
                probe(tmp_path / name)
    soundfile.write(tmp_path / "short.wav", melody(16000), 16000)
    with pytest.raises(MoleError, match=r"short\.wav.*3 s"):
        read_audio(tmp_path / "short.wav", start_s=3.0)


def test_a_cut_off_file_gives_what_it_has(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", melody(16000), 16000)
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(data[: len(data) // 2])
    assert abs(len(read_audio(tmp_path / "a.wav")) - 16000) < 100


def test_a_cut_off_stereo_file_ends_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks: none may be filled with what stood in the one before."""
    monkeypatch.setattr(read, "_BLOCK_S", 0.5)
    audio_S = melody(16000)
    soundfile.write(tmp_path / "a.wav", np.stack([audio_S, audio_S], axis=1), 16000)
    file = soundfile.SoundFile(tmp_path / "a.wav")
    found_S = _read_soundfile(CutOff(file, 20000), tmp_path / "a.wav", 0.0, None)  # type: ignore[arg-type]
    assert len(found_S) == 20000
    np.testing.assert_allclose(found_S, audio_S[:20000], atol=1e-4)


class CutOff:
    """A stereo file whose header says more than it has; libsndfile itself looks through that in most formats."""

    def __init__(self, file: soundfile.SoundFile, frames: int) -> None:
        self.file, self.left = file, frames
        self.samplerate, self.frames, self.channels = file.samplerate, file.frames, file.channels

    def read(self, frames: int, dtype: str) -> np.ndarray:
        frames = min(frames, self.left)
        self.left -= frames
        return self.file.read(frames, dtype)


@pytest.mark.parametrize("quiet_first", [True, False])
def test_the_length_of_an_mp3_file_is_not_guessed(tmp_path: Path, quiet_first: bool) -> None:
    """Variable bit rate, and no Xing header that tells the length: what recorders write that stream."""
    silence_S, sound_S = np.zeros(40000, np.float32), np.tile(melody(16000), 4)
    audio_S = np.concatenate([silence_S, sound_S] if quiet_first else [sound_S, silence_S])
    with av.open(str(tmp_path / "a.mp3"), "w", options={"write_xing": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=16000, layout="mono", options={"q": "4"})
        stream.codec_context.flags |= av.codec.context.Flags.qscale
        frame = av.AudioFrame.from_ndarray((audio_S * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=16000, frame_size=stream.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    assert len(read_audio(tmp_path / "a.mp3")) == pytest.approx(len(audio_S), abs=4000)
    assert probe(tmp_path / "a.mp3").num_samples == pytest.approx(len(audio_S), abs=4000)


def test_tags_and_damage_between_the_packets_of_an_mp3_file_are_passed_over(tmp_path: Path) -> None:
    audio_S = np.tile(melody(16000), 10)
    soundfile.write(tmp_path / "a.mp3", audio_S, 16000)
    data = (tmp_path / "a.mp3").read_bytes()
    middle = len(data) // 2
    damaged = {
        "behind": data + bytes(5000),
        "text": data + b"LYRICSBEGIN" * 50,
        "hole": data[:middle] + data[middle + 500 :],
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.mp3").write_bytes(content)
        assert len(read_audio(tmp_path / f"{name}.mp3")) == pytest.approx(len(audio_S), rel=0.1)
    part_S = read_audio(tmp_path / "a.mp3", start_s=3.0, duration_s=2.0)
    assert len(part_S) == 32000 and best_correlation(audio_S[48000:80000], part_S)[0] > 0.95


def test_names_and_rates_that_no_library_takes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    soundfile.write(os.fsencode(tmp_path / name), melody(16000), 16000, format="WAV")
    with pytest.raises(MoleError, match=r"caf\\udce9\.wav': the name of the file is not UTF-8"):
        read_audio(tmp_path / name)
    with pytest.raises(MoleError, match=r"caf\\udce9\.g722': the name of the file is not UTF-8"):  # PyAV's
        read_audio(tmp_path / name.replace("wav", "g722"))
    soundfile.write(tmp_path / "slow.wav", melody(16000), 7)
    with pytest.raises(MoleError, match=r"slow\.wav: has a sampling rate of 7 Hz"):
        read_audio(tmp_path / "slow.wav")
    soundfile.write(tmp_path / "fast.wav", melody(16000), 1_392_524_928)
    with pytest.raises(MoleError, match=r"fast\.wav: has a sampling rate of 1392524928 Hz; give 1000 to 768000 Hz"):
        read_audio(tmp_path / "fast.wav")
    soundfile.write(tmp_path / "near.wav", melody(16000), 16001)
    assert np.allclose(read_audio(tmp_path / "near.wav"), melody(16000), atol=1e-4)


def test_a_header_that_claims_too_much_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.flac", melody(16000), 16000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21:26] = bytes([content[21] | 0x0F, 255, 255, 255, 255])  # 2^36 - 1 samples
    (tmp_path / "a.flac").write_bytes(content)

    def no_memory(*words: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(soundfile.SoundFile, "read", no_memory)  # some systems promise any amount
    with pytest.raises(MoleError, match=r"a\.flac: claims to hold 68719476735 samples"):
        read_audio(tmp_path / "a.flac")


def test_reading_at_the_right_rate_imports_no_torch(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", melody(16000), 16000)
    code = (
        "import sys; from mole_asr.audio.read import read_audio; read_audio(sys.argv[1]);"
        "print([m for m in ('torch', 'torchaudio', 'av', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.wav")], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_suffixes_are_lower_case_with_a_dot() -> None:
    assert {".wav", ".g722", ".m4a", ".opus"} <= AUDIO_SUFFIXES
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in AUDIO_SUFFIXES)
