"""Reads references and hypotheses, and pairs them by utterance id."""

import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mole_asr.corpus.manifest import Manifest, is_cut
from mole_asr.corpus.normalize import normalize
from mole_asr.errors import MoleError
from mole_asr.files import is_unicode

UNKNOWN_LANGUAGE = "und"  # ISO 639-2 "undetermined"
_OPTIONAL = {"language": str, "speaker": str, "duration_s": int | float, "reliability": int | float}


@dataclass(frozen=True, slots=True)
class Sentence:
    """One utterance of a reference or hypothesis file, as read; `reliability` is between 0 and 1."""

    id: str
    text: str
    language: str | None = None
    speaker: str | None = None
    duration_s: float | None = None
    reliability: float | None = None


@dataclass(frozen=True, slots=True)
class SentenceFile:
    """The sentences of one file, by id. `numbered` says that the ids are only line numbers."""

    path: Path
    sentences: dict[str, Sentence]
    numbered: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """One utterance to score. Both texts are normalised in `language`, UNKNOWN_LANGUAGE where nobody names one."""

    id: str
    reference: str
    hypothesis: str
    language: str
    speaker: str | None = None
    duration_s: float | None = None
    hypothesis_language: str | None = None
    reliability: float | None = None


def check_keeps(output: str | Path, read: Iterable[str | Path | None]) -> None:
    """Refuses an output that would replace what is read.

    Raises:
        MoleError: it is one of the files; None among them is none.
    """
    if Path(output).resolve() in {Path(each).resolve() for each in read if each is not None}:
        raise MoleError(f"output {output}: is what is scored, and would be replaced; give another name")


def read_sentences(path: str | Path) -> SentenceFile:
    """Reads a manifest, a JSONL file of transcripts, or plain text.

    Lines that begin with `{` are JSON: cuts of a manifest, or objects with `id` and `text` (and, where known,
    `language`, `reliability`, `speaker`, `duration_s`). Plain text has an id before the first tab where every
    filled line has a tab, an id before the first space where the file is named `text` (Kaldi), and otherwise one
    sentence a line, whose id is the line number.

    Raises:
        MoleError: the file is missing, empty or malformed, or holds an id twice.
    """
    path = Path(path)
    lines = list(enumerate(_lines(path), 1))  # once: it may be a pipe
    number, first = next(((number, line) for number, line in lines if line.strip()), (0, ""))
    if not number:
        raise MoleError(f"{path} is empty: give a manifest, transcripts (JSONL) or plain text")
    if not first.lstrip().startswith("{"):
        return _read_plain(path, [line for _, line in lines])
    if is_cut(_parse(path, number, first)):
        return SentenceFile(path, _by_id(path, _read_manifest(path)), numbered=False)
    return SentenceFile(path, _by_id(path, _read_transcripts(path, lines)), numbered=False)


def pair(
    references: SentenceFile, hypotheses: SentenceFile, language: str | None, fold_accents: Collection[str]
) -> tuple[list[Pair], list[str]]:
    """Pairs by id, in the order of the references; a reference without hypothesis is paired with the empty text.

    Args:
        references: what was said.
        hypotheses: what was recognised.
        language: the language of references that name none.
        fold_accents: languages scored without accents.

    Returns:
        The pairs, and the ids of the references that have no hypothesis.

    Raises:
        MoleError: a hypothesis has an id that is not among the references, or the files cannot be paired by line.
    """
    _check_pairing(references, hypotheses)
    pairs = []
    for id, said in references.sentences.items():
        heard = hypotheses.sentences.get(id, Sentence(id, ""))
        code = said.language or language or UNKNOWN_LANGUAGE
        fold = code in fold_accents
        pairs.append(
            Pair(
                id,
                reference=normalize(said.text, code, fold_accents=fold),
                hypothesis=normalize(heard.text, code, fold_accents=fold),
                language=code,
                speaker=said.speaker,
                duration_s=heard.duration_s if said.duration_s is None else said.duration_s,
                hypothesis_language=heard.language,
                reliability=heard.reliability,
            )
        )
    return pairs, [id for id in references.sentences if id not in hypotheses.sentences]


def _check_pairing(references: SentenceFile, hypotheses: SentenceFile) -> None:
    said, heard = references.sentences, hypotheses.sentences
    if references.numbered != hypotheses.numbered:
        bare, other = (references, hypotheses) if references.numbered else (hypotheses, references)
        raise MoleError(f"{bare.path} has no utterance ids but {other.path} has: write id<TAB>text on every line")
    if references.numbered and len(said) != len(heard):
        raise MoleError(
            f"{references.path} has {len(said)} lines and {hypotheses.path} {len(heard)}: "
            "sentences without ids are paired by line, so give as many lines, or write id<TAB>text"
        )
    unknown = [id for id in heard if id not in said]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise MoleError(f"{hypotheses.path}: utterance {unknown[0]!r}{more} not in {references.path}: remove or rename")


def _lines(path: Path) -> Iterator[str]:
    # newline="\n": only line feeds end a line; U+2028 and the like may stand inside a sentence.
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except OSError as error:
        raise MoleError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise MoleError(f"{path} is not UTF-8 text: convert it first") from None


def _parse(path: Path, number: int, line: str) -> dict:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise MoleError(f"{path}, line {number} is not JSON ({error.msg}): write one object a line") from None
    except RecursionError:
        raise MoleError(f"{path}, line {number} is nested too deeply: write one object a line") from None
    if not isinstance(value, dict):
        raise MoleError(f"{path}, line {number} is not a JSON object: write one object a line")
    return value


def _read_manifest(path: Path) -> Iterator[Sentence]:
    for utterance in Manifest(path):
        yield Sentence(
            utterance.id, utterance.text, utterance.language or None, utterance.speaker, utterance.duration_s
        )


def _read_transcripts(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Sentence]:
    for number, line in lines:
        if not line.strip():
            continue
        value = _parse(path, number, line)
        if not isinstance(value.get("text"), str) or value.get("id") is None:
            raise MoleError(f"{path}, line {number} lacks 'id' or 'text': every transcript needs both")
        optional = {key: value.get(key) for key in _OPTIONAL}
        for key, kind in _OPTIONAL.items():
            if not isinstance(optional[key], kind | None):
                raise MoleError(f"{path}, line {number}: {key} {optional[key]!r} is of the wrong type: correct it")
        for key in ("id", "language", "speaker"):
            if not is_unicode(str(value.get(key))):
                raise MoleError(f"{path}, line {number}: {key} {value[key]!a} holds half a surrogate pair: correct it")
        if not 0 <= (optional["reliability"] or 0) <= 1:
            raise MoleError(f"{path}, line {number}: reliability {optional['reliability']} is not between 0 and 1")
        if not 0 <= (optional["duration_s"] or 0) < math.inf:
            raise MoleError(f"{path}, line {number}: duration_s {optional['duration_s']} is no length in seconds")
        yield Sentence(str(value["id"]), value["text"], **optional)


def _read_plain(path: Path, lines: Sequence[str]) -> SentenceFile:
    filled = [line for line in lines if line.strip()]
    separator = "\t" if all("\t" in line for line in filled) else " " if path.name == "text" else None
    if separator is None:
        sentences = {str(number): Sentence(str(number), line) for number, line in enumerate(lines, 1)}
        return SentenceFile(path, sentences, numbered=True)
    parts = (line.partition(separator) for line in filled)
    return SentenceFile(path, _by_id(path, (Sentence(id.strip(), text) for id, _, text in parts)), numbered=False)


def _by_id(path: Path, sentences: Iterable[Sentence]) -> dict[str, Sentence]:
    table: dict[str, Sentence] = {}
    for sentence in sentences:
        if sentence.id in table:
            raise MoleError(f"{path}: utterance {sentence.id!r} stands twice: keep one")
        table[sentence.id] = sentence
    return table
