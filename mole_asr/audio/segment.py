"""Find the stretches of a recording that hold sound, none longer than the recogniser takes at once.

A level meter, not a classifier: what is much quieter than the loud parts of the same recording is left out, and a long
stretch is cut where it is quietest. Noise is kept, since to lose a word is worse than to recognise nothing in noise.
"""

import numpy as np

_FRAME_S = 0.01
_SILENCE_DB = -80.0
"""Below this level (RMS, dB of full scale; 16-bit dither is near -90) nothing is taken for sound."""
_RANGE_DB = 35.0
"""Sound this much quieter than the loud parts of the recording is silence."""
_LOUD_S, _LOUD_SHARE = 3.0, 0.03
"""The level of the loud parts is the one exceeded for so long, or for a tenth of a shorter recording; in a long one for
this share of it, so that a jingle does not decide."""
_PAD_S = 0.2
"""Kept on either side, for consonants that fade in and out."""
_JOIN_S = 1.0
"""A pause shorter than this does not end a segment."""
MAX_SECONDS = 30.0
"""Cuts cost a little: dev prompts above 5 s (recipes/prompts5) have a CER of 12.5 % whole and of 12.8 % cut at 5 s."""


def speech_segments(
    audio_S: np.ndarray, sampling_rate_hz: int, max_seconds: float = MAX_SECONDS
) -> list[tuple[float, float]]:
    """Splits a recording at its pauses.

    Args:
        audio_S: float32 [S], full scale 1.
        sampling_rate_hz: its rate.
        max_seconds: longest segment allowed.

    Returns:
        (start_s, end_s) in order, disjoint. A recording of at most `max_seconds` is one segment, whole; one that is
        silent throughout gives none.
    """
    level_T = _levels_db(audio_S, round(_FRAME_S * sampling_rate_hz))
    if level_T.size == 0 or level_T.max() < _SILENCE_DB:
        return []
    duration_s = len(audio_S) / sampling_rate_hz
    if duration_s <= max_seconds:
        return [(0.0, duration_s)]
    shortest = max(1, round(min(_LOUD_S / _FRAME_S, len(level_T) / 10)))
    rank = max(shortest, round(_LOUD_SHARE * len(level_T)))
    loud_db = np.partition(level_T, -rank)[-rank]
    if loud_db - _RANGE_DB < np.percentile(level_T, 10):  # so little speech that this is the level of the noise
        loud_db = np.partition(level_T, -shortest)[-shortest]
    stretches = _stretches(level_T >= max(loud_db - _RANGE_DB, _SILENCE_DB))
    # Frames are whole numbers of samples, so at odd rates they last a little more or less than _FRAME_S.
    frame_s = round(_FRAME_S * sampling_rate_hz) / sampling_rate_hz
    longest = int(max_seconds / frame_s)
    pieces = [piece for start, end in stretches for piece in _split(level_T, start, end, longest)]
    return [(start * frame_s, min(end * frame_s, duration_s)) for start, end in pieces]


def _levels_db(audio_S: np.ndarray, frame: int) -> np.ndarray:
    """RMS level of each frame in dB, without its constant part (a shifted zero line is no sound): [ceil(S / frame)]."""
    whole = len(audio_S) // frame * frame
    power: list[np.ndarray] = []
    for part_TS in (audio_S[:whole].reshape(-1, frame), audio_S[whole:].reshape(1, -1)):
        if part_TS.size:
            # einsum adds up in float64 without a float64 copy of hours of sound.
            square_T = np.einsum("ts,ts->t", part_TS, part_TS, dtype=np.float64) / part_TS.shape[1]
            power.append(square_T - part_TS.mean(axis=1, dtype=np.float64) ** 2)
    return 10 * np.log10(np.maximum(np.concatenate(power or [np.zeros(0)]), 1e-12))


def _stretches(loud_T: np.ndarray) -> list[tuple[int, int]]:
    """Runs of loud frames, padded, and joined over short pauses: (first frame, frame after the last)."""
    edges = np.flatnonzero(np.diff(loud_T.astype(np.int8), prepend=0, append=0))
    starts, ends = edges[::2], edges[1::2]
    keep = starts[1:] - ends[:-1] >= round(_JOIN_S / _FRAME_S)
    starts, ends = np.concatenate([starts[:1], starts[1:][keep]]), np.concatenate([ends[:-1][keep], ends[-1:]])
    pad = round(_PAD_S / _FRAME_S)
    return [(max(0, int(s) - pad), min(len(loud_T), int(e) + pad)) for s, e in zip(starts, ends, strict=True)]


def _split(level_T: np.ndarray, start: int, end: int, longest: int) -> list[tuple[int, int]]:
    """Cuts a stretch at its quietest moments, so that no piece is longer than `longest` frames or a mere scrap."""
    width = min(30, longest // 8 + 1)
    window = np.full(width, 1 / width)
    pieces = []
    while end - start > longest:
        earliest = start + longest // 2
        latest = min(start + longest, end - longest // 4)
        smooth_T = np.convolve(level_T[earliest : latest + 1], window, mode="same")
        cut = earliest + int(smooth_T.argmin()) if latest > earliest else start + longest
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, end)]
