"""A recording with its transcript, as a corpus's own module hands it on, and how it is stored: 16 kHz wav."""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from mole_asr.audio.read import SAMPLING_RATE_HZ, resample
from mole_asr.corpus.manifest import Utterance
from mole_asr.corpus.normalize import normalize
from mole_asr.errors import MoleError
from mole_asr.files import atomic_path

_WAV_HEADER_BYTES = 44


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording with its transcript.

    Attributes:
        language: its code.
        key: what its source calls it; unique in source and language.
        text: what is said, without remarks of its source, not yet normalised; None where the source does not say.
        read: decodes the recording: (samples float32 [S] with full scale 1, sampling rate in Hz). Called only where
            the recording is wanted and not yet stored.
        speaker: who speaks, if known.
        fold_accents: whether the source's texts lack accents, so that none may be left.
    """

    language: str
    key: str
    text: str | None
    read: Callable[[], tuple[np.ndarray, int]]
    speaker: str | None = None
    fold_accents: bool = False

    @property
    def spoken(self) -> str:
        """The text as it is learnt and scored; empty where there is none."""
        return normalize(self.text or "", self.language, self.fold_accents)


def decode(content: bytes, name: str) -> tuple[np.ndarray, int]:
    """Decodes a wav, ogg or mp3 file that lies in memory.

    Args:
        content: the file.
        name: what to call it if it is broken.

    Returns:
        Mono samples float32 [S], full scale 1 (channels are averaged), and their sampling rate in Hz.

    Raises:
        MoleError: it cannot be decoded.
    """
    try:
        audio_SC, rate_hz = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise MoleError(f"{name}: it cannot be decoded ({error}); fetch its package again") from None
    return audio_SC.mean(axis=1), rate_hz


def store(clip: Clip, path: Path, utterance_id: str, since: float = 0.0) -> Utterance:
    """Writes the recording of `clip` as a 16 kHz wav file, 16 bits a sample, unless a whole one is there.

    Args:
        clip: to store.
        path: of the file.
        utterance_id: of the utterance.
        since: time (of the file system) before which a file was stored by other code, and is written anew.

    Returns:
        The clip as an utterance that refers to the file.
    """
    is_ours = path.exists() and path.stat().st_mtime >= since
    num_samples = (wav_samples(path) if is_ours else None) or write_wav(*clip.read(), path)
    duration_s = num_samples / SAMPLING_RATE_HZ
    return Utterance(
        utterance_id, path, 0.0, duration_s, SAMPLING_RATE_HZ, clip.spoken, clip.language, clip.speaker, num_samples
    )


def write_wav(audio_S: np.ndarray, rate_hz: int, path: Path) -> int:
    """Writes samples float32 [S] of any rate as a 16 kHz wav file, 16 bits a sample, and returns how many it has."""
    audio_S = np.clip(resample(audio_S, rate_hz, SAMPLING_RATE_HZ) * 32768, -32768, 32767)
    wav = io.BytesIO()  # soundfile waits for the disk (fsync) at every file that it closes; half of the time went there
    soundfile.write(wav, np.round(audio_S).astype(np.int16), SAMPLING_RATE_HZ, subtype="PCM_16", format="WAV")
    with atomic_path(path) as temporary:
        temporary.write_bytes(wav.getbuffer())
    return len(audio_S)


def wav_samples(path: Path) -> int | None:
    """Returns the number of samples of a wav file that `store` wrote, or None if it is missing or not whole."""
    try:
        with path.open("rb") as file:
            header = file.read(_WAV_HEADER_BYTES)
            size = file.seek(0, io.SEEK_END)
    except FileNotFoundError:
        return None
    if len(header) < _WAV_HEADER_BYTES or header[36:40] != b"data":
        return None
    data_bytes = struct.unpack("<I", header[40:])[0]
    return data_bytes // 2 if size == _WAV_HEADER_BYTES + data_bytes > _WAV_HEADER_BYTES else None
