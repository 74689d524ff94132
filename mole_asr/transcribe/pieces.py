"""What is transcribed: inputs are read and cut into pieces of speech, pieces of similar length make a batch.

Shape letters: B batch, S samples, N languages.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor

from mole_asr.audio.read import SAMPLING_RATE_HZ, is_sound, read_audio
from mole_asr.audio.segment import speech_segments
from mole_asr.decode.word import Word
from mole_asr.errors import MoleError

if TYPE_CHECKING:
    from mole_asr.corpus.manifest import Utterance

Input: TypeAlias = Union[str, Path, np.ndarray, "Utterance"]

# What is shorter is padded to this: a few frames are the least that the subsampling and the CTC can take.
_MIN_SAMPLES = SAMPLING_RATE_HZ // 10


@dataclass(slots=True, eq=False)
class Heard:
    """What the model says of a piece.

    Attributes:
        words: their times count from the start of the piece.
        reliability: of the language.
        language_probabilities_N: the posterior.
        log_prob: of the text, a mean over tokens, where the attention head wrote it.
        score: the same, with what its words say for it, where their language has a word list.
    """

    words: list[Word]
    reliability: float
    language_probabilities_N: np.ndarray
    log_prob: float = 0.0
    score: float = 0.0


@dataclass(slots=True, eq=False)
class Piece:
    """A stretch of sound that is recognised at once."""

    audio_S: np.ndarray
    start_s: float
    end_s: float
    heard: Heard = field(default_factory=lambda: Heard([], 0.0, np.zeros(0)))

    @property
    def words(self) -> list[Word]:
        """Its words; their times count from the start of the recording."""
        return [_shift(word, self.start_s, self.end_s) for word in self.heard.words]


@dataclass(slots=True, eq=False)
class Recording:
    """An input, cut into pieces; `id` is what `name_of` gives."""

    id: str
    duration_s: float
    pieces: list[Piece]


def name_of(item: Input, index: int) -> str:
    """Path as it was given, id of the utterance, or number of the array."""
    if isinstance(item, np.ndarray):
        return str(index)
    return str(item) if isinstance(item, str | Path) else item.id


def read_input(item: Input, index: int) -> tuple[str, np.ndarray]:
    """Name and samples [S] at 16 kHz of the input of this number.

    Raises:
        MoleError: it cannot be read, or the array holds no sound.
    """
    name = name_of(item, index)
    if isinstance(item, str | Path):
        return name, read_audio(item)
    if not isinstance(item, np.ndarray):
        return name, item.read_whole()
    if item.ndim != 1 or item.size == 0 or item.dtype.kind != "f" or not is_sound(item):
        raise MoleError(
            f"input {index}: give finite float samples [S] of full scale 1, not {item.dtype} {list(item.shape)}"
        )
    return name, item.astype(np.float32, copy=False)


def cut(name: str, audio_S: np.ndarray, max_seconds: float) -> Recording:
    """Cuts a recording of more than `max_seconds` at its pauses; silence is left out."""
    pieces = []
    for start_s, end_s in speech_segments(audio_S, SAMPLING_RATE_HZ, max_seconds):
        part_S = audio_S[round(start_s * SAMPLING_RATE_HZ) : round(end_s * SAMPLING_RATE_HZ)]
        pieces.append(Piece(part_S, start_s, end_s))
    return Recording(name, len(audio_S) / SAMPLING_RATE_HZ, pieces)


def batches(pieces: list[Piece], batch_seconds: float) -> Iterator[list[Piece]]:
    """Pieces of similar length, the longest first, so that a lack of memory shows at once."""
    batch: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.audio_S)):
        if batch and (len(batch) + 1) * len(batch[0].audio_S) > batch_seconds * SAMPLING_RATE_HZ:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def pad(audio: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Samples [B, S], padded with zeros, and lengths [B]."""
    lengths_B = torch.tensor([max(_MIN_SAMPLES, len(audio_S)) for audio_S in audio])
    audio_BS = torch.zeros(len(audio), int(lengths_B.max()))
    for row, audio_S in enumerate(audio):
        audio_BS[row, : len(audio_S)] = torch.from_numpy(audio_S)
    return audio_BS, lengths_B


def _shift(word: Word, start_s: float, end_s: float) -> Word:
    """Word times count from the start of the recording; the last frame may reach beyond the end of the sound."""
    first_s = min(start_s + word.start_s, end_s)
    return Word(word.text, first_s, min(start_s + word.end_s, end_s), word.confidence)
