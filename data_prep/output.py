"""What every corpus writes: a manifest for each split, the list of what was left out, and a printed table."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mole_asr.corpus import normalize
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.data_prep import clips
from mole_asr.errors import MoleError
from mole_asr.files import write_text

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class PrepareResult:
    """What `prepare` did.

    Attributes:
        utterances: split, or kind of a copy -> number of utterances.
        failures: one line for each recording that was skipped: its path and the reason.
    """

    utterances: dict[str, int]
    failures: list[str] = field(default_factory=list)


def manifest_path(output: str | Path, split: str) -> Path:
    """Returns where the manifest of a split (train, dev or test) lies: `<output>/cuts_<split>.jsonl`."""
    return Path(output) / f"cuts_{split}.jsonl"


def write_corpus(
    output: Path,
    utterances: Mapping[str, Iterable[Utterance]],
    left_out: Iterable[tuple[str, str, str]],
    recipe: str | None = None,
) -> None:
    """Writes a manifest a split, `left_out.tsv`, and last `prepared.json`.

    Args:
        output: folder to write.
        utterances: split -> its utterances.
        left_out: (language, name, reason) of everything that was not used.
        recipe: what `is_done` is asked about later.
    """
    (output / "prepared.json").unlink(missing_ok=True)
    rows = [("language", "name", "reason"), *left_out]
    lines = ("\t".join(" ".join(cell.split()) for cell in row) for row in rows)  # no cell may end its column or line
    write_text(output / "left_out.tsv", "".join(f"{line}\n" for line in lines))
    for split, members in utterances.items():
        write_manifest(members, manifest_path(output, split))
    if recipe is not None:
        write_text(output / "prepared.json", recipe)


def code_recipe(settings: Mapping[str, Any], *code: str | Path) -> str:
    """Returns what a corpus depends on: settings, and the code and tables in files, so that no update is missed.

    The code that every corpus passes through (text normalisation, storing of audio) is counted in.
    """
    files = [Path(file).read_bytes() for file in (*code, normalize.__file__, clips.__file__)]
    return json.dumps({**settings, "code": hashlib.sha256(b"".join(files)).hexdigest()})


def is_done(output: Path, recipe: str, splits: Sequence[str] = SPLITS) -> bool:
    """Whether `output` was wholly written by `recipe`, and all its recordings are still there and whole."""
    stamp = output / "prepared.json"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != recipe or not (output / "left_out.tsv").exists():
        return False
    try:
        manifests = [Manifest(manifest_path(output, split)) for split in splits]
    except MoleError:
        return False
    utterances = (utterance for manifest in manifests for utterance in manifest)
    return all(clips.wav_samples(utterance.audio_path) == utterance.num_samples for utterance in utterances)


def audio_since(output: Path, recipe: str) -> float:
    """When this code began to store recordings: older ones are whole, and may be others than this recipe's."""
    stamp, code = output / "audio" / "code", json.loads(recipe)["code"]
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != code:
        write_text(stamp, code)
    return stamp.stat().st_mtime


def print_left_out(output: Path) -> None:
    """Prints what was left out: counts a reason and language."""
    lines = (output / "left_out.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
    rows = [line.split("\t") for line in lines]
    for (language, reason), count in sorted(Counter((row[0], row[2]) for row in rows).items()):
        print(f"left out: {language:3} {count:4d} {reason}")
    if rows:
        print(f"(named in {output / 'left_out.tsv'})")


def print_summary(output: Path) -> None:
    """Prints what was left out and a table: language, split, utterances, hours."""
    print_left_out(output)
    manifests = [Manifest(manifest_path(output, split)) for split in SPLITS]
    print("language" + "".join(f"{split + ' utterances':>18}{'hours':>7}" for split in SPLITS))
    for language in [*sorted(set().union(*(manifest.languages for manifest in manifests))), "all"]:
        cells = ""
        for manifest in manifests:
            chosen = np.array([language in ("all", manifest.languages[i]) for i in manifest.language_ids], dtype=bool)
            cells += f"{chosen.sum():18d}{manifest.durations_s[chosen].sum() / 3600:7.2f}"
        print(f"{language:8}{cells}")
