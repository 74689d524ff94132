"""Read any audio file as mono float32 samples.

soundfile reads wav, flac, ogg, opus and parts of mp3, and seeks to the part that is asked for; PyAV decodes the rest
(mp3 to its end, m4a, webm, mkv, amr, headerless G.722) from the beginning. torch is imported only if a file has to be
resampled, so that a data-loading worker that reads 16 kHz recordings pays for nothing but the read.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from mole_asr.errors import MoleError
from mole_asr.files import is_unicode

if TYPE_CHECKING:
    from av import AudioFrame
    from av.container import InputContainer
    from torchaudio.transforms import Resample

SAMPLING_RATE_HZ = 16000
"""Of all models: what is read for them is resampled to it."""

_SUFFIXES = """
    .wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .sph .w64 .rf64
    .m4a .m4b .mp4 .mov .aac .webm .mkv .mka .wma .amr .awb .3gp .ac3 .g722
"""
AUDIO_SUFFIXES = frozenset(_SUFFIXES.split())
"""Suffixes (lower case) of the files that a walk through a folder takes for audio."""

_BLOCK_S = 60.0
# libsndfile gives a number near 2^63 for a stream whose header does not say how long it is.
_UNKNOWN_LENGTH = 1 << 48
# A resampling kernel has (old rate x new rate / gcd^2) taps: odd rates are replaced by one at most 0.1 % away.
_MAX_RATIO_TERM = 1000
# What claims another rate is no recording of speech, and no header to be believed.
_MIN_RATE_HZ, _MAX_RATE_HZ = 1000, 768_000
_LOUDEST = 1e10  # full scale is 1, or 2^31 where integers were stored as floats; the power of garbage is infinite


def find_audio(folder: str | Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Walks through a folder, and at last through those that links lead to; hidden ones are passed by.

    Returns:
        Its audio files, sorted, each folder's by the name that it has without links; and (path, reason) of each folder
        that cannot be looked into.
    """
    found, failures, seen = list[Path](), list[tuple[str, str]](), set[str]()

    def note(error: OSError) -> None:
        failures.append((str(error.filename), str(error.strerror)))

    starts = [Path(folder)]
    for start in starts:  # it grows
        for place, folders, names in os.walk(start, onerror=note):
            if (real := os.path.realpath(place)) in seen:  # a link back, or a second one
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [path for name in folders if (path := Path(place, name)).is_symlink()]
            paths = (Path(place, name) for name in names if not name.startswith("."))
            found += [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES and _may_be_read(path)]
    return sorted(found), failures


def _may_be_read(path: Path) -> bool:
    """False of pipes and devices; what may not be looked at is named when it is read."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What a file holds: its own sampling rate, samples in each channel, channels, and length in seconds."""

    sampling_rate_hz: int
    num_samples: int
    channels: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.num_samples / self.sampling_rate_hz


def read_audio(
    path: str | Path, sampling_rate_hz: int = SAMPLING_RATE_HZ, start_s: float = 0.0, duration_s: float | None = None
) -> np.ndarray:
    """Reads a file, or a part of it, as mono samples at the rate asked for.

    Args:
        path: the audio file.
        sampling_rate_hz: rate of the result; the file may have any other.
        start_s: where to start.
        duration_s: how much to read (None: to the end). A file that ends earlier gives what it has.

    Returns:
        float32 [S], full scale is 1; several channels are averaged.

    Raises:
        MoleError: no such file, not audio, no sample in the part asked for, or samples that are no sound.
    """
    path = Path(path)
    try:
        sound = _open_soundfile(path, None if duration_s is None else start_s + duration_s)
    except soundfile.SoundFileError:
        audio_S, file_rate_hz = _read_av(path, start_s, duration_s)
    else:
        with sound:
            audio_S, file_rate_hz = _read_soundfile(sound, path, start_s, duration_s), sound.samplerate
    if audio_S.size == 0:
        where = f" at or after {start_s:g} s; the file is shorter than that" if start_s else ""
        raise MoleError(f"{path}: holds no sound{where}")
    if not is_sound(audio_S):
        raise MoleError(
            f"{path}: holds samples that are NaN, infinite or beyond all bounds; export the recording again"
        )
    return resample(audio_S, file_rate_hz, sampling_rate_hz)


def is_sound(audio_S: np.ndarray) -> bool:
    """Whether all samples are numbers, and of a size that sound has."""
    low, high = float(audio_S.min(initial=0.0)), float(audio_S.max(initial=0.0))
    return low >= -_LOUDEST and high <= _LOUDEST  # a comparison with NaN is false


def probe(path: str | Path) -> AudioInfo:
    """Looks up rate, length and channels.

    A file that only PyAV reads is decoded to count its samples: headers of such containers are often wrong or silent.

    Raises:
        MoleError: no such file, not audio, or no sample in it.
    """
    path = Path(path)
    try:
        with _open_soundfile(path) as sound:
            info = AudioInfo(sound.samplerate, sound.frames, sound.channels)
    except soundfile.SoundFileError:
        rate_hz, num_samples, channels = 0, 0, 0
        for rate_hz, block_CS in _av_blocks(path):  # noqa: B007  # the last rate is the file's
            channels, num_samples = len(block_CS), num_samples + block_CS.shape[1]
        info = AudioInfo(rate_hz, num_samples, channels)
    if info.num_samples == 0:
        raise MoleError(f"{path}: holds no sound")
    return info


def resample(audio_S: np.ndarray, old_rate_hz: int, new_rate_hz: int) -> np.ndarray:
    """Changes the sampling rate (windowed sinc of torchaudio), a minute at a time to bound the memory.

    Args:
        audio_S: float32 [S].
        old_rate_hz: its rate.
        new_rate_hz: the rate of the result.

    Returns:
        float32 [ceil(S x new / old)]; the very same array if the rates are equal, or 0.1 % apart.
    """
    if old_rate_hz == new_rate_hz:
        return audio_S
    import torch

    ratio = Fraction(old_rate_hz, new_rate_hz).limit_denominator(_MAX_RATIO_TERM)
    old, new = ratio.numerator, ratio.denominator
    if old == new:
        return audio_S
    resampler = _resampler(old, new)
    # Chunks start at multiples of `old`, where the output has a sample at the same instant.
    chunk = old * max(1, round(_BLOCK_S * old_rate_hz / old))
    margin = old * (resampler.width // old + 1)
    resampled_S = np.empty(-(-len(audio_S) * new // old), dtype=np.float32)
    for start in range(0, len(audio_S), chunk):
        first = max(0, start - margin)
        part_S = torch.from_numpy(np.ascontiguousarray(audio_S[first : start + chunk + margin]))
        with torch.inference_mode():
            # The zeros change no sample: torchaudio rounds the length in float32, and at times ends a sample too early.
            part_S = resampler(torch.nn.functional.pad(part_S, (0, old)))[(start - first) // old * new :]
        at = start // old * new
        length = min(chunk // old * new, len(resampled_S) - at)
        resampled_S[at : at + length] = part_S[:length].numpy()
    return resampled_S


@lru_cache(maxsize=16)
def _resampler(old: int, new: int) -> "Resample":
    """Keeps the kernels: to compute one takes longer than to filter a short utterance with it."""
    from torchaudio.transforms import Resample

    return Resample(old, new)


def _open_soundfile(path: Path, end_s: float | None = None) -> soundfile.SoundFile:
    """Opens with soundfile.

    Args:
        path: the file.
        end_s: up to where it is read; None: to its end.

    Raises:
        SoundFileError: PyAV has to read the file.
        MoleError: there is no such file, or it cannot be read by anything.
    """
    if not is_unicode(str(path)):
        raise MoleError(f"{str(path)!a}: the name of the file is not UTF-8; rename it")
    # The bytes of headerless G.722 can look like an MP3 frame; `.raw` makes soundfile ask for a rate.
    if path.suffix.lower() in (".g722", ".raw"):
        raise soundfile.SoundFileError("no header")
    try:
        sound = soundfile.SoundFile(path)
    except soundfile.SoundFileError:
        if not path.is_file():
            raise MoleError(f"{path}: no such audio file") from None
        raise
    # Of an MP3 file of variable bit rate libsndfile guesses the length by its beginning, and reads no further.
    is_guessed = sound.format == "MP3" and (end_s is None or end_s * sound.samplerate > sound.frames)
    if sound.frames > _UNKNOWN_LENGTH or is_guessed:
        sound.close()
        raise soundfile.SoundFileError("unknown length")
    if not _MIN_RATE_HZ <= sound.samplerate <= _MAX_RATE_HZ:
        sound.close()
        raise MoleError(
            f"{path}: has a sampling rate of {sound.samplerate} Hz; give {_MIN_RATE_HZ} to {_MAX_RATE_HZ} Hz"
        )
    return sound


def _read_soundfile(sound: soundfile.SoundFile, path: Path, start_s: float, duration_s: float | None) -> np.ndarray:
    """Seeks and reads; channels are averaged block by block, so that a long stereo file is never held whole.

    A file that was cut off ends before the length in its header.
    """
    rate_hz = sound.samplerate
    start = min(round(start_s * rate_hz), sound.frames)
    count = sound.frames - start
    if duration_s is not None:
        count = min(count, round(duration_s * rate_hz))
    try:
        if start:
            sound.seek(start)
        if sound.channels == 1:
            return sound.read(count, dtype="float32")
        blocks = [np.zeros(0, np.float32)]
        while count and len(block_SC := sound.read(min(count, round(_BLOCK_S * rate_hz)), "float32")):
            blocks.append(block_SC.mean(axis=1))
            count -= len(block_SC)
        return np.concatenate(blocks)
    except soundfile.SoundFileError as error:
        raise MoleError(f"{path}: broken audio file: {_one_line(error)}") from None
    except MemoryError:
        raise MoleError(f"{path}: claims to hold {count} samples, more than fit into the memory") from None


def _read_av(path: Path, start_s: float, duration_s: float | None) -> tuple[np.ndarray, int]:
    """Decodes from the beginning to the end of the part: time stamps of containers are not exact enough to seek by."""
    rate_hz, position, blocks = 16000, 0, []
    for rate_hz, block_CS in _av_blocks(path):
        start = max(0, round(start_s * rate_hz) - position)
        stop = block_CS.shape[1]
        if duration_s is not None:
            stop = min(stop, round(start_s * rate_hz) + round(duration_s * rate_hz) - position)
            if stop <= 0:
                break
        blocks.append(block_CS[:, start:stop].mean(axis=0))
        position += block_CS.shape[1]
    return np.concatenate(blocks or [np.zeros(0, np.float32)]), rate_hz


def _av_blocks(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (sampling rate, samples float32 [C, S]) of the first audio stream, some milliseconds at a time."""
    if not path.is_file():
        raise MoleError(f"{path}: no such audio file")
    import av

    try:
        with av.open(str(path), format="g722" if path.suffix.lower() == ".g722" else None) as container:
            if not container.streams.audio:
                raise MoleError(f"{path}: holds no audio stream")
            to_float = av.AudioResampler(format="fltp")
            for frame in _av_frames(container):
                for float_frame in to_float.resample(frame):
                    yield float_frame.sample_rate, float_frame.to_ndarray()
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise MoleError(f"{path}: not an audio file that can be read: {_one_line(error)}") from None


def _av_frames(container: "InputContainer") -> "Iterator[AudioFrame]":
    """What can be decoded of the first audio stream: tags and damage between packets are passed over, as players do."""
    import av

    broken: av.FFmpegError | None = None
    found = False
    for packet in container.demux(container.streams.audio[0]):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            broken = error
            continue
        found = found or bool(frames)
        yield from frames
    if broken is not None and not found:
        raise broken


def _one_line(error: Exception) -> str:
    """What went wrong, without the path that FFmpeg repeats."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())
