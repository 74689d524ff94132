"""What every corpus writes: a manifest for each split, the list of what was left out, and a printed table."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.files import write_text

SPLITS = ("train", "dev", "test")


def manifest_path(output: str | Path, split: str) -> Path:
    """Returns where the manifest of a split (train, dev or test) lies: `<output>/cuts_<split>.jsonl`."""
    return Path(output) / f"cuts_{split}.jsonl"


def write_corpus(
    output: Path, utterances: Mapping[str, Iterable[Utterance]], left_out: Iterable[tuple[str, str, str]]
) -> None:
    """Writes a manifest a split, and `left_out.tsv`.

    Args:
        output: folder to write.
        utterances: split -> its utterances.
        left_out: (language, name, reason) of everything that was not used.
    """
    for split in SPLITS:
        write_manifest(utterances[split], manifest_path(output, split))
    rows = [("language", "name", "reason"), *left_out]
    write_text(output / "left_out.tsv", "".join("\t".join(row) + "\n" for row in rows))


def print_summary(output: Path) -> None:
    """Prints what was left out (counts a reason and language) and a table: language, split, utterances, hours."""
    rows = [line.split("\t") for line in (output / "left_out.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    for (language, reason), count in sorted(Counter((row[0], row[2]) for row in rows).items()):
        print(f"left out: {language:3} {count:4d} {reason}")
    if rows:
        print(f"(named in {output / 'left_out.tsv'})")
    manifests = [Manifest(manifest_path(output, split)) for split in SPLITS]
    print("language" + "".join(f"{split + ' utterances':>18}{'hours':>7}" for split in SPLITS))
    for language in [*sorted(set().union(*(manifest.languages for manifest in manifests))), "all"]:
        cells = ""
        for manifest in manifests:
            chosen = np.array([language in ("all", manifest.languages[i]) for i in manifest.language_ids], dtype=bool)
            cells += f"{chosen.sum():18d}{manifest.durations_s[chosen].sum() / 3600:7.2f}"
        print(f"{language:8}{cells}")
