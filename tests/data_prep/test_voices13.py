import hashlib
import io
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.corpus.manifest import Manifest, Utterance
from mole_asr.data_prep import festvox_ru, prompts, tuxpaint, voices13
from mole_asr.data_prep.output import manifest_path
from mole_asr.errors import MoleError

Package = Callable[[Mapping[str, bytes]], bytes]
STAMPS = "usr/share/tuxpaint/stamps"


def sound(samples: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.linspace(-0.5, 0.5, samples, dtype=np.float32), 16000, format="WAV")
    return buffer.getvalue()


@pytest.fixture
def small(deb: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with packages of two sources, of which a small split table names some clips and one that is missing."""
    ogg = io.BytesIO()
    soundfile.write(ogg, np.zeros(4000, np.float32), 32000, format="OGG")
    contents = {
        "festvox-ru": {
            "usr/v/etc/txt.done.data": '( ru_1 "М+ама." )\n( ru_2 "Папа." )\n( ru_3 "..." )'.encode(),
            **{f"usr/v/wav/ru_{n}.wav": sound(n * 1000) for n in (1, 2, 3)},
        },
        "tuxpaint-stamps-default": {
            f"{STAMPS}/animals/cat.txt": "A cat.\nes.utf8=Un gato, ¡año!\nda.utf8=En kat.".encode(),
            f"{STAMPS}/animals/cat_desc_es.ogg": ogg.getvalue(),
            f"{STAMPS}/animals/cat_desc_da.ogg": ogg.getvalue(),
        },
    }
    folder = tmp_path / "packages"
    folder.mkdir()
    for module in (festvox_ru, tuxpaint):
        (name,) = module.PACKAGES
        content = deb(contents[name])
        (folder / f"{name}_1_all.deb").write_bytes(content)
        monkeypatch.setattr(module, "PACKAGES", {name: hashlib.sha256(content).hexdigest()})
    table = {
        ("festvox-ru", "ru", "ru_1"): ("nsh", "train"),
        ("festvox-ru", "ru", "ru_3"): ("nsh", "train"),
        ("festvox-ru", "ru", "ru_9"): ("nsh", "dev"),
        ("tuxpaint", "es", "animals/cat"): ("volunteer", "unseen"),
    }
    monkeypatch.setattr(voices13, "SOURCES", {"festvox-ru": festvox_ru, "tuxpaint": tuxpaint})
    monkeypatch.setattr(voices13, "split_table", lambda: table)
    return folder


def rows(output: Path) -> dict[str, list[Utterance]]:
    manifests = {split: Manifest(manifest_path(output, split)) for split in voices13.SPLITS}
    return {split: list(manifest) for split, manifest in manifests.items()}


def test_only_what_the_split_table_names_is_used(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    voices13.prepare(output, small)
    found = rows(output)
    assert {split: len(members) for split, members in found.items()} == {"train": 1, "dev": 0, "test": 0, "unseen": 1}
    (train,), (unseen,) = found["train"], found["unseen"]
    assert (train.id, train.text, train.speaker, train.num_samples) == ("festvox-ru-ru-ru_1", "мама", "nsh", 1000)
    assert (unseen.id, unseen.text, unseen.speaker) == ("tuxpaint-es-animals_cat", "un gato año", "volunteer")
    assert soundfile.info(unseen.audio_path).frames == unseen.num_samples == 2000
    assert (output / "left_out.tsv").read_text(encoding="utf-8").splitlines()[1:] == [
        "ru\tfestvox-ru: ru_2\tnot in the split table",
        "ru\tfestvox-ru: ru_3\tin the split table, but without a text",
        "ru\tfestvox-ru: ru_9\tin the split table, but no recording",
        "da\ttuxpaint: animals/cat\tnot in the split table",
    ]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["festvox-ru", "ru", "train", "1", "2", "0.00", "<-", "differs"] in printed
    assert ["festvox-ru", "ru", "dev", "0", "1", "0.00", "<-", "differs"] in printed
    assert ["tuxpaint", "es", "unseen", "1", "1", "0.00"] in printed
    assert ["all", "2", "4", "0.00"] in printed
    assert ["licence", "of", "tuxpaint:", "GPL-2"] in printed


def test_a_second_run_needs_no_packages_and_mends_what_is_lost(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    voices13.prepare(output, small)
    first = rows(output)
    voices13.prepare(output, "/nowhere")
    (lost,), (kept,) = first["train"], first["unseen"]
    before = kept.audio_path.stat().st_mtime_ns
    lost.audio_path.write_bytes(lost.audio_path.read_bytes()[:500])
    with pytest.raises(MoleError, match=r"nowhere: 2 packages are missing; download festvox-ru, tuxpaint"):
        voices13.prepare(output, "/nowhere")
    voices13.prepare(output, small)
    assert rows(output) == first and soundfile.info(lost.audio_path).frames == 1000
    assert kept.audio_path.stat().st_mtime_ns == before


def test_an_interrupted_run_goes_on(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr(tuxpaint, "clips", lambda packages: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            voices13.prepare(output, small)
    assert not manifest_path(output, "train").exists()
    voices13.prepare(output, small)
    assert len(rows(output)["train"]) == 1


def test_the_split_table() -> None:
    table = voices13.split_table()
    assert len(table) == 15418
    assert {source for source, _, _ in table} == set(voices13.SOURCES)
    assert len({language for _, language, _ in table}) == 13
    counts = Counter(split for _, split in table.values())
    assert counts == {"train": 11615, "dev": 1042, "test": 1155, "unseen": 1606}
    split_of_speaker: dict[str, set[str]] = {}
    for speaker, split in table.values():
        split_of_speaker.setdefault(speaker, set()).add(split)
    unseen = {speaker for speaker, splits in split_of_speaker.items() if "unseen" in splits}
    assert unseen == {"tuxpaint-es", "tuxpaint-fr", "tuxpaint-ru"}
    assert all(split_of_speaker[speaker] == {"unseen"} for speaker in unseen)


def test_prompts_have_the_split_of_their_own_corpus() -> None:
    table = {place: split for place, (_, split) in voices13.split_table().items() if place[0] == "prompts"}
    assert len(table) == 2669
    assert all(prompts.split_of(key) == split for (_, _, key), split in table.items())
