"""Whisper's text tokenizer: byte-level BPE and signs for languages and tasks, read from a tokenizer.json."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mole_asr.errors import MoleError
from mole_asr.files import write_text

FILE_NAME = "tokenizer.json"
_START, _END, _TRANSCRIBE, _NO_TIMES = "<|startoftranscript|>", "<|endoftext|>", "<|transcribe|>", "<|notimestamps|>"
_ITS_CODES = {"jv": "jw", "nb": "no"}  # what Whisper writes for ISO 639-1 codes
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")


class WhisperTokenizer:
    """The tokenizer of a multilingual Whisper model (Radford et al., 2022, section 2.3 and figure 1).

    Instances can be pickled.

    Args:
        path: a tokenizer.json, or the folder that holds it.

    Attributes:
        end_id: token behind the last of a text.
        language_ids: token of each language code, as Whisper writes the codes ("en", "jw", "haw").

    Raises:
        MoleError: the package `tokenizers` is not there, or the file is no multilingual Whisper tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MoleError(f"{path}: Whisper's tokenizer cannot be read ({error})") from None
        self._load(text, str(path))

    @classmethod
    def from_text(cls, text: str) -> "WhisperTokenizer":
        """Makes a tokenizer from the text of a tokenizer.json."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(text, "Whisper's tokenizer")
        return tokenizer

    def _load(self, text: str, name: str) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MoleError(f"{name}: needs the package tokenizers; pip install 'mole-asr[whisper]'") from None
        try:
            json.loads(text)
            self._tokenizer: Any = Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing more special
            raise MoleError(f"{name}: not a tokenizer.json ({error}); copy the model's anew") from None
        self._tokenizer.encode_special_tokens = True  # a text that looks like a sign is a text
        self.text = text
        special = {
            token.content: number
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self.language_ids = {match[1]: i for word, i in special.items() if (match := _LANGUAGE.fullmatch(word))}
        missing = [word for word in (_START, _END, _TRANSCRIBE, _NO_TIMES) if word not in special]
        if missing or len(self.language_ids) < 2:
            lacks = missing[0] if missing else "languages"
            raise MoleError(f"{name}: has no {lacks}; give a multilingual Whisper model (not one for English alone)")
        self.end_id = special[_END]
        self._start_id, self._behind_language = special[_START], [special[_TRANSCRIBE], special[_NO_TIMES]]

    def __getstate__(self) -> str:
        return self.text

    def __setstate__(self, text: str) -> None:
        self._load(text, "Whisper's tokenizer")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without prompt and end. As Whisper writes it, with a space before the first word."""
        return self._tokenizer.encode(" " + text.strip(), add_special_tokens=False).ids if text.strip() else []

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without the leading space; special tokens and times are left out."""
        # Models have ids for times beyond those of the file; all come behind the end sign.
        return self._tokenizer.decode([int(i) for i in ids if i < self.end_id], skip_special_tokens=True).strip()

    def sign(self, language: str) -> str | None:
        """The key of a language code in `language_ids`; None where Whisper does not know the language."""
        base = language.partition("-")[0]
        code = _ITS_CODES.get(base, base)
        return code if code in self.language_ids else None

    def prompt(self, language: str | None) -> list[int]:
        """What the decoder reads first.

        Args:
            language: code, of which only what stands before the first hyphen is looked at (`pt-BR`); None, or a
                language that Whisper does not know, leaves it out.
        """
        sign = self.sign(language or "")
        known = [self.language_ids[sign]] if sign else []
        return [self._start_id, *known, *self._behind_language]

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json into a folder."""
        write_text(Path(folder) / FILE_NAME, self.text)
