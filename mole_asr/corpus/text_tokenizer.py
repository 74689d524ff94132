"""Text <-> token ids: a sentencepiece model whose id 0 is the CTC blank.

"Text tokenizer" is this; "language tokenizer" is MoLE's language classifier.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from mole_asr.arguments import check_at_least, check_seed
from mole_asr.corpus.manifest import Manifest
from mole_asr.corpus.texts import holds_texts, read_texts
from mole_asr.errors import MoleError
from mole_asr.files import atomic_path, check_folder

BLANK = "<blank>"
FILE_NAME = "tokenizer.model"
ModelType = Literal["unigram", "bpe", "char"]

_MAX_SENTENCES = 1_000_000  # more tells the trainer nothing new, and it keeps them all in memory
_SPACE = "\u2581"  # sentencepiece's sign for a space


class TextTokenizer:
    """A sentencepiece model with blank id 0, unknown id 1, and no sentence marks.

    Texts are taken as they are: manifests are already normalised. `decode(encode(text)) == text` for any text of a
    tokenizer with byte fallback (except that U+2581, sentencepiece's own sign for a space, comes back as a space).
    Two tokenizers are equal if their models are, byte for byte. Instances can be pickled.

    Args:
        path: a model file, or a folder that holds `tokenizer.model`.

    Raises:
        MoleError: there is no such file, or it is no tokenizer of ours.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        try:
            self._load(path.read_bytes())
        except OSError as error:
            raise MoleError(f"{path}: the text tokenizer cannot be read ({error.strerror})") from None
        except RuntimeError:
            raise MoleError(f"{path}: not a sentencepiece model; make one with `mole-asr tokenizer train`") from None
        if not self.vocab_size or self.piece(0) != BLANK:
            raise MoleError(f"{path}: its id 0 is not {BLANK}; make one with `mole-asr tokenizer train`")

    @classmethod
    def from_bytes(cls, model: bytes) -> "TextTokenizer":
        """Makes a tokenizer from the bytes of a sentencepiece model."""
        tokenizer = cls.__new__(cls)
        tokenizer._load(model)
        return tokenizer

    def _load(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)

    @property
    def vocab_size(self) -> int:
        """Number of ids, blank and unknown included."""
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        return self._processor.encode(text)

    @property
    def unknown_id(self) -> int:
        """The id of letters that no piece has; a tokenizer with byte fallback never gives it."""
        return self._processor.unk_id()

    def unknown(self, text: str) -> list[str]:
        """Returns the runs of letters of a text that no piece has."""
        ids = self.encode(text)
        if self.unknown_id not in ids:  # as nearly always: spares the second pass
            return []
        pieces = self._processor.encode(text, out_type=str)
        return [piece.replace(_SPACE, " ") for piece, i in zip(pieces, ids, strict=True) if i == self.unknown_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; blanks vanish, unknown tokens become " ⁇ "."""
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token_id: int) -> str:
        """Returns a token as sentencepiece writes it: "▁" is a space, "<0x41>" a byte."""
        return self._processor.id_to_piece(int(token_id))

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.model` into a folder and returns its path."""
        path = Path(folder) / FILE_NAME
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.model)
        return path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextTokenizer) and self.model == other.model

    def __hash__(self) -> int:
        return hash(self.model)

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return TextTokenizer.from_bytes, (self.model,)

    def __repr__(self) -> str:
        return f"TextTokenizer(vocab_size={self.vocab_size})"


def train_tokenizer(
    manifest: str | Path,
    output: str | Path,
    vocab_size: int = 500,
    balance: float = 0.5,
    byte_fallback: bool = True,
    model_type: ModelType = "unigram",
    seed: int = 0,
) -> TextTokenizer:
    """Trains a text tokenizer on the texts of a manifest and writes it to `output/tokenizer.model`.

    Args:
        manifest: cut set with normalised texts, or JSON lines with "text" and "language".
        output: folder to write.
        vocab_size: number of ids; blank, unknown and (with `byte_fallback`) 256 bytes are among them. With
            `model_type` char it is an upper bound: there are as many ids as there are characters.
        balance: languages are sampled with p ~ n^balance (n sentences of that language): 1 takes the texts as they
            are, 0 gives every language the same weight; smaller languages are repeated.
        byte_fallback: spell unseen characters as UTF-8 bytes, so that no text is unknown.
        model_type: unigram, bpe, or char.
        seed: for the choice of sentences.

    Raises:
        MoleError: no texts, a `vocab_size` that does not fit them, or a folder that cannot be made.
    """
    check_seed(seed)
    check_folder(output)
    sentences = _sentences(manifest, balance, seed)
    _check_vocab_size(vocab_size, sentences, byte_fallback)
    tokenizer = _train(sentences, vocab_size, byte_fallback, model_type, hard_limit=model_type != "char")
    tokenizer.save(output)
    return tokenizer


def extend_tokenizer(
    tokenizer: str | Path,
    manifest: str | Path,
    output: str | Path,
    extra_pieces: int = 100,
    balance: float = 0.5,
    seed: int = 0,
) -> TextTokenizer:
    """Appends pieces for the texts of a new language; every old id keeps its piece, so a model can grow with it.

    First come the characters that the tokenizer lacks, the most frequent first, then the best pieces of a tokenizer
    trained on the new texts alone. Old texts may be cut into other pieces than before where a new one fits them.

    Args:
        tokenizer: the tokenizer to extend: file or folder.
        manifest: cut set of the new language (or languages).
        output: folder to write; the old tokenizer is not changed.
        extra_pieces: how many pieces to append at most; fewer, or none, where the texts give no more.
        balance: as in `train_tokenizer`, among the languages of `manifest`.
        seed: as in `train_tokenizer`.

    Raises:
        MoleError: no texts, the output is the old tokenizer, or `extra_pieces` is too small for the new characters of
            a tokenizer without byte fallback.
    """
    check_seed(seed)
    check_at_least(0, extra_pieces=extra_pieces)
    protobuf: Any = import_module("sentencepiece.sentencepiece_model_pb2")  # its classes are made at run time
    old = TextTokenizer(tokenizer)
    old_path = Path(tokenizer) / FILE_NAME if Path(tokenizer).is_dir() else Path(tokenizer)
    if (Path(output) / FILE_NAME).resolve() == old_path.resolve():
        raise MoleError(f"output {output}: has the old tokenizer, which models need; give another folder")
    check_folder(output)
    model = protobuf.ModelProto.FromString(old.model)
    model_type = protobuf.TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower()
    sentences = _sentences(manifest, balance, seed)
    alphabet = _alphabet(sentences)
    candidates_size = len(alphabet) + 2 + old.vocab_size + extra_pieces
    trained = _train(sentences, candidates_size, False, model_type, hard_limit=False)
    candidates = protobuf.ModelProto.FromString(trained.model).pieces[2:]
    known = {piece.piece for piece in model.pieces}
    new = [piece for piece in candidates if piece.piece not in known]
    # A stable sort: within each half the trainer's order stays, which is best (or most frequent) first.
    new.sort(key=lambda piece: len(piece.piece) > 1)
    missing = sum(len(piece.piece) == 1 for piece in new)
    if missing > extra_pieces and not model.trainer_spec.byte_fallback:
        raise MoleError(f"--extra-pieces {extra_pieces}: is too small, {manifest} has {missing} new characters")
    lowest = min(piece.score for piece in model.pieces)
    for i, piece in enumerate(new[:extra_pieces]):
        # In a BPE model a score is a rank: new merges come after all old ones. In the others it is a log probability.
        score = lowest - 1 - i if model_type == "bpe" else piece.score
        model.pieces.add(piece=piece.piece, score=score, type=piece.type)
    model.trainer_spec.vocab_size = len(model.pieces)
    extended = TextTokenizer.from_bytes(model.SerializeToString())
    extended.save(output)
    return extended


class _Sentences:
    """The texts of a file, drawn with p ~ n^balance; can be gone through again and again."""

    def __init__(self, text_of: Callable[[int], str], rows: np.ndarray) -> None:
        self.text_of, self.rows = text_of, rows

    def __iter__(self) -> Iterator[str]:
        return map(self.text_of, self.rows)


def _rows_by_language(path: str | Path) -> tuple[Callable[[int], str], list[np.ndarray]]:
    """What gives the text of a row, and the rows of each language that have one."""
    if holds_texts(path):
        by_language = list(read_texts(path).values())
        texts = [text for each in by_language for text in each]
        ends = np.cumsum([len(each) for each in by_language])
        return texts.__getitem__, np.split(np.arange(len(texts)), ends[:-1])
    manifest = Manifest(path)
    rows = [
        np.flatnonzero((manifest.language_ids == language) & (manifest.text_lengths > 0))
        for language in range(-1, len(manifest.languages))
    ]
    return lambda row: manifest[row].text, rows


def _sentences(path: str | Path, balance: float, seed: int) -> _Sentences:
    if not 0 <= balance <= 1:
        raise MoleError(f"--balance {balance:g}: must be from 0 to 1")
    text_of, rows_by_language = _rows_by_language(path)
    rows_by_language = [rows for rows in rows_by_language if len(rows)]
    if not rows_by_language:
        raise MoleError(f"{path}: no utterance has a text; a tokenizer needs texts")
    sizes = np.array([len(rows) for rows in rows_by_language], dtype=np.float64)
    weights = sizes**balance
    # So many that no language loses sentences, or as many as the trainer can take.
    total = min((sizes / weights).max() * weights.sum(), _MAX_SENTENCES)
    generator = np.random.default_rng(seed)
    draws = np.maximum(1, np.round(total * weights / weights.sum())).astype(int)
    drawn = [_draw(rows, count, generator) for rows, count in zip(rows_by_language, draws, strict=True)]
    return _Sentences(text_of, np.concatenate(drawn))


def _draw(rows: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws `count` rows, each as often as any other (give or take one)."""
    whole, rest = divmod(count, len(rows))
    return np.concatenate([np.tile(rows, whole), generator.choice(rows, rest, replace=False)])


def _alphabet(sentences: Iterable[str]) -> set[str]:
    return set().union(*sentences, _SPACE) - {" "}


def _check_vocab_size(vocab_size: int, sentences: Iterable[str], byte_fallback: bool) -> None:
    characters = len(_alphabet(sentences))
    needed = 2 + 256 * byte_fallback + characters
    if vocab_size < needed:
        parts = f"{characters} characters" + " + 256 bytes" * byte_fallback + f" + {BLANK} + <unk>"
        raise MoleError(f"vocab_size={vocab_size} is too small for these texts: give at least {needed} ({parts})")


def _train(
    sentences: Iterable[str], vocab_size: int, byte_fallback: bool, model_type: str, hard_limit: bool
) -> TextTokenizer:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            hard_vocab_limit=hard_limit,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,  # bytes; the default drops long sentences in silence
            pad_id=0,
            pad_piece=BLANK,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # more would make the scores depend on their timing
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"set it to a value <= (\d+)", str(error)):
            raise MoleError(f"vocab_size={vocab_size} is too large: these texts give at most {found[1]}") from None
        raise MoleError(f"sentencepiece cannot train on these texts: {' '.join(str(error).split())}") from None
    return TextTokenizer.from_bytes(model.getvalue())
