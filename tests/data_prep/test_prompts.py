import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mole_asr.corpus.manifest import Manifest, Utterance
from mole_asr.data_prep import clips, debian, prompts
from mole_asr.data_prep.output import SPLITS, manifest_path
from mole_asr.errors import MoleError

EXPECTED = {
    "en": (456, 46, 49),
    "es": (396, 41, 40),
    "fr": (418, 45, 46),
    "it": (474, 47, 57),
    "ru": (456, 46, 52),
}


def rows(output: Path) -> list[tuple[str, Utterance]]:
    manifests = [(split, Manifest(manifest_path(output, split))) for split in SPLITS]
    return [(split, utterance) for split, manifest in manifests for utterance in manifest]


@pytest.fixture(scope="module")
def prepared(prompt_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prompts")
    prompts.prepare(output, source=prompt_packages)
    return output


@pytest.mark.corpus
def test_utterances_of_each_split(prepared: Path) -> None:
    counts = Counter((row.language, split) for split, row in rows(prepared))
    assert {language: tuple(counts[language, split] for split in SPLITS) for language in EXPECTED} == EXPECTED
    hours = {split: Manifest(manifest_path(prepared, split)).durations_s.sum() / 3600 for split in SPLITS}
    assert hours == pytest.approx({"train": 1.69, "dev": 0.16, "test": 0.21}, abs=0.005)


@pytest.mark.corpus
def test_a_prompt_is_in_one_split_in_every_language(prepared: Path) -> None:
    splits: dict[str, set[str]] = {}
    for split, row in rows(prepared):
        splits.setdefault(row.id.split("-", 1)[1], set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.corpus
def test_texts_are_normalised_and_mended(prepared: Path) -> None:
    texts = {row.id: row.text for _, row in rows(prepared)}
    assert texts["en-spy-iax2"] == "iax"
    assert texts["es-digits_0"] == "cero"
    assert texts["it-conf-full"] == "la conferenza è piena"
    assert texts["it-vm-tempremoved"].endswith("stato eliminato")
    assert texts["ru-conf-adminmenu"].startswith("нажмите один чтобы")
    alphabet = set("".join(text for name, text in texts.items() if name.startswith("es-")))
    assert alphabet <= set("abcdefghijklmnopqrstuvwxyz '")
    assert not any(c.isdigit() or c.isupper() for text in texts.values() for c in text)


@pytest.mark.corpus
def test_audio_is_16_khz_speech_of_the_stated_length(prepared: Path) -> None:
    for _, row in rows(prepared)[::50]:
        audio_S, rate_hz = soundfile.read(row.audio_path, dtype="int16")
        assert (rate_hz, len(audio_S)) == (16000, row.num_samples)
        assert row.duration_s == row.num_samples / 16000
        assert np.abs(audio_S).max() > 1000


@pytest.mark.corpus
def test_everything_unused_is_listed_once(prepared: Path, prompt_packages: Path) -> None:
    listed = [line.split("\t") for line in (prepared / "left_out.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    assert len({(language, key) for language, key, _ in listed}) == len(listed)
    audio = {
        name.partition("/sounds/")[2].partition("/")[2].removesuffix(".g722")
        for name, _ in debian.members(next(prompt_packages.glob("*-it-g722_*.deb")))
        if name.endswith(".g722")
    }
    unused = {key for language, key, reason in listed if language == "it" and reason != "transcript without audio"}
    used = {row.audio_path.stem for _, row in rows(prepared) if row.language == "it"}
    assert {key.replace("/", "-") for key in audio - unused} == used


@pytest.mark.corpus
def test_second_run_mends_only_what_is_missing(
    prompt_packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded: list[int] = []
    decode = prompts._decode

    def spy(content: bytes) -> tuple[np.ndarray, int]:
        decoded.append(len(content))
        return decode(content)

    monkeypatch.setattr(prompts, "_decode", spy)
    prompts.prepare(tmp_path, languages=["en"], source=prompt_packages)
    assert len(decoded) == 551
    decoded.clear()
    prompts.prepare(tmp_path, languages=["en"], source="/nowhere")  # all is done: packages are not even looked at
    assert not decoded
    lost = rows(tmp_path)[3][1]
    lost.audio_path.unlink()
    prompts.prepare(tmp_path, languages=["en"], source=prompt_packages)
    assert decoded == [lost.num_samples // 2]  # G.722 has two samples a byte
    assert lost.audio_path.exists()
    assert "CC BY-SA 3.0" in capsys.readouterr().out
    monkeypatch.setattr(clips, "__file__", __file__)  # other code stores them now
    decoded.clear()
    prompts.prepare(tmp_path, languages=["en"], source=prompt_packages)
    assert len(decoded) == 551


@pytest.mark.corpus
def test_damaged_package_is_named(prompt_packages: Path, tmp_path: Path) -> None:
    for path in prompt_packages.glob("asterisk-core-sounds-en*.deb"):
        shutil.copy(path, tmp_path)
    damaged = next(tmp_path.glob("asterisk-core-sounds-en_*.deb"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    with pytest.raises(MoleError, match="SHA-256") as caught:
        prompts.prepare(tmp_path / "out", languages=["en"], source=tmp_path)
    assert damaged.name in str(caught.value)


def test_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match=r"2 packages are missing; download asterisk-core-sounds-ru, "):
        prompts.prepare(tmp_path / "out", languages=["ru"], source=tmp_path)


def test_unknown_language_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="'de'"):
        prompts.prepare(tmp_path, languages=["en", "de"])
    for languages in ([], ["en", "en"]):
        with pytest.raises(MoleError, match="languages: give some of en, es, fr, it, ru, each once"):
            prompts.prepare(tmp_path, languages=languages)


def test_split_rule() -> None:
    groups = prompts._groups()
    assert len(groups) == 133
    assert all(key != group and group not in groups and group < key for key, group in groups.items())
    assert all(prompts.split_of(key) == prompts.split_of(group) for key, group in groups.items())
    assert [prompts.split_of(key) for key in ("activated", "added", "agent-alreadyon")] == ["train", "test", "dev"]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("it", "Il saluto è stato eliminato vm-then-pound: poi premere", "Il saluto è stato eliminato"),
        ("it", "degli altri. confbridge-mute-in: Per disattivare confbridge-mute-out: per", "degli altri."),
        ("it", "La conferenza ? piena", "La conferenza è piena"),
        ("fr", "La conf ? oui", "La conf ? oui"),
        ("ru", "первoe", "первое"),
    ],
)
def test_repair(language: str, text: str, expected: str) -> None:
    assert prompts.repair(text, language) == expected


@pytest.mark.parametrize(
    ("key", "line", "expected"),
    [
        ("letters/at", "at [@]", "at"),
        ("letters/exclaimation-point", "[!] punto esclamativo", "punto esclamativo"),
        ("beep", "<beep ascending>", ""),
        ("spy-iax2", 'IAX (note: does not say "2")', "IAX"),
        ("x", "al menu poli (ne m'appelez plus, jamais), 4", "al menu poli ne m'appelez plus, jamais, 4"),
        ("x", "a  b", "a b"),
        ("conf", "conf: say this", "say this"),
    ],
)
def test_clean(key: str, line: str, expected: str) -> None:
    assert prompts.clean(key, line) == expected
