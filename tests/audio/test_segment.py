import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.audio.segment import speech_segments


def bursts(parts: list[tuple[float, float]], rate_hz: int, seed: int = 0, floor: float = 0.0) -> np.ndarray:
    """Noise bursts: for each (silent seconds, loud seconds)."""
    rng = np.random.default_rng(seed)
    pieces = []
    for silent_s, loud_s in parts:
        pieces += [np.zeros(round(silent_s * rate_hz)), 0.1 * rng.standard_normal(round(loud_s * rate_hz))]
    audio_S = np.concatenate(pieces)
    return (audio_S + floor * rng.standard_normal(len(audio_S))).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.floats(0, 8), st.floats(0.05, 12)), min_size=1, max_size=6),
    rate_hz=st.sampled_from([2000, 2205]),
    max_seconds=st.sampled_from([1.0, 5.0, 20.0]),
    floor=st.sampled_from([0.0, 3e-4, 0.03]),
)
def test_segments_are_ordered_short_and_cover_the_sound(
    parts: list[tuple[float, float]], rate_hz: int, max_seconds: float, floor: float
) -> None:
    audio_S = bursts(parts, rate_hz, floor=floor)
    segments = speech_segments(audio_S, rate_hz, max_seconds)
    flat = [t for segment in segments for t in segment]
    assert flat == sorted(flat)
    assert flat[0] >= 0
    assert flat[-1] <= len(audio_S) / rate_hz
    assert all(0 < end - start <= max_seconds + 1e-9 for start, end in segments)
    covered = sum(float((audio_S[round(s * rate_hz) : round(e * rate_hz)] ** 2).sum()) for s, e in segments)
    assert covered >= 0.98 * float((audio_S**2).sum())


def test_a_short_recording_is_one_whole_segment() -> None:
    assert speech_segments(bursts([(3.0, 1.0), (4.0, 1.0), (2.0, 0.1)], 16000), 16000) == [(0.0, pytest.approx(11.1))]
    assert speech_segments(np.ones(100, np.float32) * np.linspace(-1, 1, 100, dtype=np.float32), 16000) == [
        (0.0, 100 / 16000)
    ]


@pytest.mark.parametrize("seconds", [0.0, 0.001, 1.0, 50.0])
def test_silence_has_no_segment(seconds: float) -> None:
    samples = round(seconds * 16000)
    assert speech_segments(np.zeros(samples, np.float32), 16000) == []
    dither_S = np.random.default_rng(0).integers(-1, 2, samples).astype(np.float32) / 32768
    assert speech_segments(dither_S, 16000) == []
    # A zero line that is off (cheap converters) is silent too.
    assert speech_segments(np.full(samples, 0.3, np.float32), 16000) == []


def test_long_silence_is_left_out() -> None:
    audio_S = bursts([(10.0, 3.0), (30.0, 2.0), (0.5, 2.0), (15.0, 0.0)], 16000, floor=1e-4)
    segments = speech_segments(audio_S, 16000)
    assert segments == [(pytest.approx(9.8, abs=0.05), pytest.approx(13.2, abs=0.05)),
                        (pytest.approx(42.8, abs=0.05), pytest.approx(47.7, abs=0.05))]  # fmt: skip


def test_a_jingle_leaves_quiet_speech_in() -> None:
    audio_S = np.concatenate([5 * bursts([(0, 4.0)], 16000), 0.05 * bursts([(0.5, 4.0)] * 40, 16000, seed=1)])
    segments = speech_segments(audio_S, 16000)
    assert segments[-1][1] == pytest.approx(len(audio_S) / 16000, abs=0.3)
    assert sum(end - start for start, end in segments) > 160


def test_little_speech_in_a_long_noise_is_found() -> None:
    audio_S = bursts([(100.0, 4.0), (200.0, 4.0), (290.0, 0.0)], 8000, floor=5e-4)
    assert sum(end - start for start, end in speech_segments(audio_S, 8000)) == pytest.approx(8.8, abs=0.3)


def test_a_long_stretch_is_cut_in_its_pauses() -> None:
    audio_S = bursts([(0, 12.0), (0.4, 14.0), (0.4, 13.0)], 16000, floor=1e-4)
    segments = speech_segments(audio_S, 16000, max_seconds=20.0)
    assert len(segments) == 3
    assert 12.0 < segments[0][1] < 12.4
    assert 26.4 < segments[1][1] < 26.8
    assert segments[0][1] == segments[1][0]
