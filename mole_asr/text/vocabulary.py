"""Text <-> token ids of a language model: bytes, or the pieces of a sentencepiece model, behind one interface."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mole_asr.corpus.text_tokenizer import FILE_NAME, TextTokenizer

BYTES = "bytes"


class Vocabulary(ABC):
    """Ids of texts, and two more: the separator that stands between sentences, and the mask of an encoder.

    Attributes:
        size: V, number of ids.
        separator: id between sentences; a text begins behind one.
        mask: id that hides a token from an encoder.
        unknown: id of letters that cannot be spelled; None where all can.
        fingerprint: bytes that two vocabularies share where they are the same.
    """

    size: int
    separator: int
    mask: int
    unknown: int | None = None
    fingerprint: bytes

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """int64 ids of a text, without separators."""

    def unspelled(self, text: str) -> list[str]:
        """The runs of letters that become the id `unknown`."""
        return []

    def unspelled_bytes(self, text: str) -> int:
        """UTF-8 bytes of the letters that become the id `unknown`."""
        return sum(len(run.encode("utf-8")) for run in self.unspelled(text))

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; a separator is a line break, and masks vanish."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the file that `load_vocabulary` needs into a folder, if one is needed."""


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes as ids 0..255, the separator 256 and the mask 257. Any text in any script has ids."""

    size, separator, mask, fingerprint = 258, 256, 257, BYTES.encode()

    def encode(self, text: str) -> np.ndarray:
        """The bytes."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        spelled = (ord("\n") if token == self.separator else int(token) for token in ids if token != self.mask)
        return bytes(spelled).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Needs no file; that of pieces, which a model before may have left, is taken away."""
        (Path(folder) / FILE_NAME).unlink(missing_ok=True)


class PieceVocabulary(Vocabulary):
    """The pieces of a `TextTokenizer`, so the ids of a recogniser too; its blank, id 0, is the separator.

    Args:
        tokenizer: of the texts; the mask is one more id behind its last one.
    """

    separator = 0

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.size, self.mask, self.fingerprint = tokenizer.vocab_size + 1, tokenizer.vocab_size, tokenizer.model
        self.unknown = tokenizer.unknown_id

    def encode(self, text: str) -> np.ndarray:
        """The ids of the pieces."""
        return np.array(self.tokenizer.encode(text), np.int64)

    def unspelled(self, text: str) -> list[str]:
        """What the tokenizer has no piece for; with byte fallback nothing."""
        return self.tokenizer.unknown(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; each line is decoded by itself."""
        lines: list[list[int]] = [[]]
        for token in map(int, ids):
            if token == self.separator:
                lines.append([])
            elif token != self.mask:
                lines[-1].append(token)
        return "\n".join(self.tokenizer.decode(line) for line in lines)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.model`."""
        self.tokenizer.save(folder)


def load_vocabulary(name: str | Path) -> Vocabulary:
    """A vocabulary by its name in a config.

    Args:
        name: "bytes", or the path of a sentencepiece model, or a folder that holds one (`mole-asr tokenizer train`).

    Raises:
        MoleError: there is no such file, or it is no tokenizer of ours.
    """
    return ByteVocabulary() if name == BYTES else PieceVocabulary(TextTokenizer(name))


def load_saved_vocabulary(folder: str | Path) -> Vocabulary:
    """The vocabulary of a model folder: pieces if it holds `tokenizer.model`, else bytes."""
    folder = Path(folder)
    return load_vocabulary(folder if (folder / FILE_NAME).exists() else BYTES)
