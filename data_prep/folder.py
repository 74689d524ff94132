"""Your own recordings: audio files with a `.txt` beside each, or a table that names them.

A folder: `hello.wav` with `hello.txt` beside it, in UTF-8. The language is the name of the innermost folder that is a
language code (`recordings/en/hello.wav`), or else it is given, or else the name of the given folder. A table (`.tsv`,
`.csv` with a header line, or `.jsonl`): columns path, text, and where wanted language, speaker, split (train, dev,
test); paths are relative to the table.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole_asr.audio.read import find_audio, probe
from mole_asr.corpus.languages import check_language, is_known_language
from mole_asr.corpus.manifest import Utterance
from mole_asr.corpus.normalize import normalize
from mole_asr.data_prep.output import SPLITS, PrepareResult, print_summary, write_corpus
from mole_asr.errors import MoleError, print_skipped
from mole_asr.files import check_folder, is_unicode

_EXPECTED = "give a folder of audio files with a .txt beside each, or a .tsv, .csv or .jsonl table (path, text, ...)"
_COLUMNS = ("path", "text", "language", "speaker", "split")


@dataclass(frozen=True, slots=True)
class _Item:
    """A recording as the user describes it; `split` is empty where it is ours to choose."""

    audio_path: Path
    name: str  # becomes the utterance id
    text: str | Path  # a path is a file that holds the text
    language: str
    speaker: str | None = None
    split: str = ""


def prepare(
    source: str | Path,
    output: str | Path,
    language: str | None = None,
    dev_percent: int = 10,
    test_percent: int = 10,
    fold_accents: bool = False,
) -> PrepareResult:
    """Writes manifests of your own recordings: `cuts_train.jsonl`, `cuts_dev.jsonl`, `cuts_test.jsonl`.

    Audio is not copied: the manifests point at it. Recordings that cannot be used (broken or missing audio, no text)
    and folders that cannot be looked into are skipped and named at the end and in `left_out.tsv`.

    Args:
        source: a folder of audio files with a `.txt` beside each, or a table (`.tsv`, `.csv`, `.jsonl`) with the
            columns path, text, and where wanted language, speaker, split.
        output: folder to write.
        language: code of the language of all recordings that name none themselves, by a folder below `source` or in
            the table.
        dev_percent: share of the texts for the dev split. Splits go by a hash of the text, so that the same sentence
            is never in two of them.
        test_percent: share of the texts for the test split.
        fold_accents: strip diacritics from the texts.

    Raises:
        MoleError: no usable recording at all, a recording without language, or a malformed table.
    """
    source, output = Path(source), Path(output)
    check_folder(output)
    if language is not None:
        check_language(language)
    if dev_percent < 0 or test_percent < 0 or dev_percent + test_percent >= 100:
        raise MoleError(f"dev_percent={dev_percent} and test_percent={test_percent} leave nothing to train on")
    found: list[tuple[Utterance, str]] = []
    items, unseen = _items(source, language)
    left_out = [(language or "", _printable(path), reason) for path, reason in unseen]
    ids: Counter[str] = Counter()
    for item in items:
        try:
            found.append((_utterance(item, fold_accents, ids), item.split))
        except MoleError as error:
            reason = str(error).removeprefix(f"{item.audio_path}: ")
            left_out.append((item.language, _printable(item.audio_path), " ".join(reason.split())))
    failures = [f"{path}: {reason}" for _, path, reason in left_out]
    if not found:
        raise MoleError(f"{source}: no usable recording; " + (failures[0] if failures else _EXPECTED))
    given = {utterance.text: split for utterance, split in found if split}
    utterances: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
    for utterance, split in found:
        split = split or given.get(utterance.text) or _choose_split(utterance.text, dev_percent, test_percent)
        utterances[split].append(utterance)
    write_corpus(output, utterances, left_out)
    print_summary(output)
    print_skipped(failures)
    return PrepareResult({split: len(rows) for split, rows in utterances.items()}, failures)


def _printable(path: str | Path) -> str:
    """The path, where its bytes are no UTF-8 with them spelled out."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _items(source: Path, language: str | None) -> tuple[Iterator[_Item], list[tuple[str, str]]]:
    """The recordings, and (path, reason) of each folder that cannot be looked into."""
    if source.is_dir():
        paths, unseen = find_audio(source)
        return _folder_items(source, paths, language), unseen
    if not source.exists():
        raise MoleError(f"{source}: no such file or folder; {_EXPECTED}")
    if source.suffix not in (".tsv", ".csv", ".jsonl"):
        raise MoleError(f"{source}: not a table that we read; {_EXPECTED}")
    return _table_items(source, language), []


def _folder_items(folder: Path, paths: Sequence[Path], language: str | None) -> Iterator[_Item]:
    """The audio files below a folder, each with the `.txt` that stands beside it."""
    for path in paths:
        # Innermost first; what stands above the given folder says nothing of the recordings.
        parents = path.relative_to(folder).parent.parts[::-1]
        outermost = folder.absolute().name if language is None else language
        found = next((name for name in (*parents, outermost) if name == language or is_known_language(name)), None)
        if found is None:
            raise MoleError(f"{path}: of which language? Give --language, or name a parent folder by its code")
        yield _Item(path, path.relative_to(folder).with_suffix("").as_posix(), path.with_suffix(".txt"), found)


def _table_items(table: Path, language: str | None) -> Iterator[_Item]:
    """The rows of a table; raises MoleError at the first malformed one."""
    for line, row in _table_rows(table):
        where = f"{table}, row {line}"
        if any(row.get(None, ())):
            todo = "take out tabs in texts" if table.suffix == ".tsv" else "put a text with commas between quotes"
            raise MoleError(f"{where}: it has more cells than the header; {todo}")
        if not row.get("path") or row.get("text") is None:
            raise MoleError(f"{where}: it needs a path and a text; columns are {', '.join(_COLUMNS)}")
        row_language = row.get("language") or language
        if not row_language:
            raise MoleError(f"{where}: of which language? Give --language or a column language")
        split = row.get("split") or ""
        if split and split not in SPLITS:
            raise MoleError(f"{where}: {split!r} is no split; choose from {', '.join(SPLITS)}, or leave it empty")
        path = Path(row["path"])
        if not path.name:
            raise MoleError(f"{where}: {row['path']!r} is no file")
        name = path.with_suffix("").as_posix().lstrip("./")
        speaker = row.get("speaker") or None
        try:
            check_language(row_language)
        except MoleError as error:
            raise MoleError(f"{where}: {error}") from None
        yield _Item(table.parent / path, name, row["text"], row_language, speaker, split)


def _table_rows(table: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    """Yields (row number, column -> value; what is beyond the columns is a list under None)."""
    number = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _parse_row(line, f"{table}, row {number}")
            else:
                dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
                rows = csv.DictReader(file, **(dialect if table.suffix == ".tsv" else {"strict": True}))
                for number, row in enumerate(rows, 1):
                    yield number, row
    except (OSError, ValueError, AttributeError, csv.Error) as error:
        raise MoleError(f"{table}: the table cannot be read behind row {number} ({error})") from None


def _parse_row(line: str, where: str) -> dict[str, str]:
    try:
        values = {key: value for key, value in json.loads(line).items() if value is not None}
    except (ValueError, AttributeError, RecursionError):
        raise MoleError(f"{where}: is no JSON object") from None
    for key, value in values.items():
        if isinstance(value, bool | list | dict) and key in _COLUMNS:
            raise MoleError(f"{where}: its {key} is {value!r}, no text")
    row = {key: str(value) for key, value in values.items()}
    if not all(map(is_unicode, row.values())):
        raise MoleError(f"{where}: holds half a surrogate pair, which no file can")
    return row


def _utterance(item: _Item, fold_accents: bool, ids: Counter[str]) -> Utterance:
    """Probes the audio and normalises the text; raises MoleError with the reason if the item cannot be used."""
    info = probe(item.audio_path)
    text = normalize(_read_text(item.text), item.language, fold_accents)
    if not text:
        raise MoleError("its transcript has no words")
    name = item.name.replace("/", "_").replace("#", "_")  # "#2" is for the second of one name
    ids[name] += 1
    return Utterance(
        id=name if ids[name] == 1 else f"{name}#{ids[name]}",
        audio_path=item.audio_path.absolute(),
        start_s=0.0,
        duration_s=info.duration_s,
        sampling_rate_hz=info.sampling_rate_hz,
        text=text,
        language=item.language,
        speaker=item.speaker,
        num_samples=info.num_samples,
        channels=info.channels,
    )


def _read_text(text: str | Path) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MoleError(f"no {text.name} beside it") from None
    except (OSError, UnicodeDecodeError):
        raise MoleError(f"{text.name} cannot be read as UTF-8") from None


def _choose_split(text: str, dev_percent: int, test_percent: int) -> str:
    bucket = int(hashlib.sha1(text.encode()).hexdigest(), 16) % 100
    return "test" if bucket < test_percent else "dev" if bucket < test_percent + dev_percent else "train"
