from pathlib import Path

import pytest

from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.corpus.subset import hours_of, thin
from mole_asr.errors import MoleError


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    wav = tmp_path / "none.wav"
    write_manifest(
        (
            Utterance(f"{code}-{n}", wav, 0.0, 1.0 + n % 7, 16000, "text", code, num_samples=16000 * 8)
            for n in range(60)
            for code in ("en", "fr", "ru")
        ),
        tmp_path / "all.jsonl",
    )
    return tmp_path / "all.jsonl"


def hours(path: Path) -> dict[str, float]:
    table = Manifest(path)
    return {code: float(table.durations_s[table.language_ids == n].sum()) for n, code in enumerate(table.languages)}


def test_shares_of_hours_the_same_every_time(manifest: Path, tmp_path: Path) -> None:
    whole = hours(manifest)
    assert hours_of(manifest) == {code: seconds / 3600 for code, seconds in whole.items()}
    count = thin(manifest, tmp_path / "part.jsonl", {"fr": 0.5, "ru": 0.1})
    part = hours(tmp_path / "part.jsonl")
    assert part["en"] == whole["en"]
    assert part["fr"] == pytest.approx(0.5 * whole["fr"], abs=1.0) and part["ru"] == pytest.approx(
        0.1 * whole["ru"], abs=1.0
    )
    assert part["fr"] <= 0.5 * whole["fr"] and part["ru"] <= 0.1 * whole["ru"]
    assert len(Manifest(tmp_path / "part.jsonl")) == count
    thin(manifest, tmp_path / "again.jsonl", {"ru": 0.1, "fr": 0.5})
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "part.jsonl").read_bytes()


def test_who_is_taken_does_not_depend_on_the_order_of_the_lines(manifest: Path, tmp_path: Path) -> None:
    lines = manifest.read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join(reversed(lines)))
    for name in ("all", "turned"):
        thin(tmp_path / f"{name}.jsonl", tmp_path / f"{name}-part.jsonl", {"ru": 0.3})
    parts = [set((tmp_path / f"{name}-part.jsonl").read_text().splitlines()) for name in ("all", "turned")]
    assert parts[0] == parts[1]


@pytest.mark.parametrize(("shares", "words"), [({"xx": 0.5}, "'xx'"), ({"fr": 1.5}, "share of fr: 1.5")])
def test_what_cannot_be_is_refused(manifest: Path, tmp_path: Path, shares: dict, words: str) -> None:
    with pytest.raises(MoleError, match=words):
        thin(manifest, tmp_path / "part.jsonl", shares)
