"""What sources of texts yield, and the files of a text corpus: JSONL a split, counts of what was left out, a table."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mole_asr.corpus.families import branch_of, family_of
from mole_asr.corpus.languages import MAJOR_LANGUAGES
from mole_asr.data_prep.output import SPLITS
from mole_asr.files import atomic_path, write_text
from mole_asr.score.scripts import script_of

LeftOut = Counter[tuple[str, str, str]]  # (language, source, reason) -> number of sentences


class Entry(NamedTuple):
    """One text of one language, as its source has it.

    Attributes:
        source: name of the source (`firefox`).
        language: our code.
        key: what all translations of the same text share, within the source.
        text: the raw text.
        escapes: whether backslashes in it escape.
    """

    source: str
    language: str
    key: str
    text: str
    escapes: bool = False


class Text(NamedTuple):
    """One sentence; `key` is what its translations share."""

    text: str
    language: str
    source: str
    id: str
    key: str


def write_texts(output: Path, splits: Mapping[str, Iterable[Text]], left_out: LeftOut) -> None:
    """Writes a JSONL file a split, and the counts of what was left out."""
    for split, texts in splits.items():
        with atomic_path(texts_path(output, split)) as path, path.open("w", encoding="utf-8") as file:
            for text in texts:
                row = {"text": text.text, "language": text.language, "source": text.source, "id": text.id}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    rows = ["\t".join((*place, str(count))) for place, count in sorted(left_out.items())]
    write_text(output / "left_out.tsv", "\n".join(["language\tsource\treason\tsentences", *rows]) + "\n")


def texts_path(output: str | Path, split: str) -> Path:
    """Returns where the texts of a split (train, dev or test) lie: `<output>/texts_<split>.jsonl`."""
    return Path(output) / f"texts_{split}.jsonl"


def summary(output: str | Path) -> str:
    """Returns a table of the corpus in `output`: sentences and characters by language and split."""
    sizes: Counter[tuple[str, str]] = Counter()
    characters: dict[str, Counter[str]] = defaultdict(Counter)
    for split in SPLITS:
        with texts_path(output, split).open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                for language in (row["language"], "all"):
                    sizes[language, f"{split} sentences"] += 1
                    sizes[language, f"{split} characters"] += len(row["text"])
                characters[row["language"]].update(row["text"])
    columns = [f"{split} {unit}" for split in SPLITS for unit in ("sentences", "characters")]
    lines = [("language", "", "family", "branch", "script", *columns)]
    for language in sorted(characters):
        kind = "major" if language in MAJOR_LANGUAGES else "minor"
        kin = (language, kind, family_of(language), branch_of(language), _script(characters[language]))
        lines.append((*kin, *(str(sizes[language, column]) for column in columns)))
    lines.append(("all", "", "", "", "", *(str(sizes["all", column]) for column in columns)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if i > 4 else f"{cell:{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _script(characters: Counter[str]) -> str:
    """The script that most letters are of."""
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        if name := script_of(character):
            scripts[name] += count
    return max(scripts, key=lambda name: scripts[name]).lower()
