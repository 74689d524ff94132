"""A part of a manifest, the same on every machine: for conditions with less training speech."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.errors import MoleError


def thin(manifest: str | Path, output: str | Path, shares: Mapping[str, float]) -> int:
    """Writes the manifest with only a share of the hours of some languages.

    Utterances of such a language are taken in the order of the SHA-1 of their ids, each that still fits.

    Args:
        manifest: to read.
        output: to write; the order of the utterances stays.
        shares: language -> share of its hours, 0 to 1; other languages stay whole.

    Returns:
        The number of utterances written.

    Raises:
        MoleError: a language is not in the manifest, or a share is not from 0 to 1.
    """
    table = Manifest(manifest)
    for code, share in shares.items():
        if code not in table.languages:
            raise MoleError(
                f"{manifest}: no utterance has the language {code!r}; there are {', '.join(table.languages)}"
            )
        if not 0 <= share <= 1:
            raise MoleError(f"share of {code}: {share:g} must be from 0 to 1")
    utterances = list(table)
    by_language: dict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        by_language[utterance.language].append(utterance)
    taken = {u.id for code, members in by_language.items() for u in _take(members, shares.get(code, 1.0))}
    return write_manifest((utterance for utterance in utterances if utterance.id in taken), output)


def hours_of(manifest: str | Path) -> dict[str, float]:
    """Hours of each language of a manifest."""
    table = Manifest(manifest)
    return {
        code: float(table.durations_s[table.language_ids == number].sum()) / 3600
        for number, code in enumerate(table.languages)
    }


def _take(utterances: list[Utterance], share: float) -> list[Utterance]:
    if share == 1:
        return utterances
    room_s = share * sum(utterance.duration_s for utterance in utterances)
    taken = []
    for utterance in sorted(utterances, key=lambda utterance: hashlib.sha1(utterance.id.encode()).hexdigest()):
        if utterance.duration_s <= room_s:
            taken.append(utterance)
            room_s -= utterance.duration_s
    return taken
