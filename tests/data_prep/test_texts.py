"""The text corpus: what `prepare` writes, from packages that are put together here."""

import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mole_asr.corpus.families import branch_of, family_of
from mole_asr.corpus.languages import MAJOR_LANGUAGES
from mole_asr.data_prep import texts, texts_catalogues, texts_split, texts_udhr
from mole_asr.data_prep.debian import sha256
from mole_asr.data_prep.texts import language_table, prepare, split_texts
from mole_asr.data_prep.texts_clean import normal_form
from mole_asr.data_prep.texts_files import Text, texts_path
from mole_asr.errors import MoleError
from mole_asr.score.scripts import scripts_of

Package = Callable[[Mapping[str, bytes]], bytes]

ENGLISH = ["north", "south", "east", "west", "first", "second", "third", "fourth", "fifth", "last"]
GERMAN = ["Norden", "Süden", "Osten", "Westen", "Erste", "Zweite", "Dritte", "Vierte", "Fünfte", "Letzte"]


def message(words: list[str], number: int, pattern: str) -> str:
    return pattern.format(words[number % 10], words[number // 10 % 10], words[(number * 7 + 3) % 10])


def pack(language: str, words: list[str], pattern: str) -> bytes:
    """A language pack of 100 messages, one with a hole, one that is not translated, and one word."""
    lines = [f"m{number} = {message(words, number, pattern)}" for number in range(100)]
    lines += ["hole = There are { $count } of them now", "english = Nobody has translated this one", "word = Word"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"browser/localization/{language}/a.ftl", "\n".join(lines) + "\n")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path, deb: Package, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with packages in English and German, and the tables that name them."""
    folder = tmp_path / "packages"
    folder.mkdir()
    packs = {
        "en-gb": pack("en-GB", ENGLISH, "We sail {}, then a {} time, at {}."),
        "de": pack("de", GERMAN, "Wir segeln nach {}, dann zum {} Mal, und {}."),
    }
    content = {f"firefox-esr-l10n-{code}": deb({"usr/lib/langpack.xpi": xpi}) for code, xpi in packs.items()}
    content |= {name: deb({}) for name in texts_catalogues.CAMPAIGNS}
    for name, data in content.items():
        (folder / f"{name}_1_all.deb").write_bytes(data)
    with tarfile.open(folder / texts_udhr.PACKAGE, "w:gz") as tar:
        for code, text in {"eng": "All are born free.", "deu": "Alle sind frei geboren."}.items():
            page = f'<article data-number="1"><h2>1</h2><p>{text} </p></article>'.encode()
            info = tarfile.TarInfo(f"package/declaration/{code}.html")
            info.size = len(page)
            tar.addfile(info, io.BytesIO(page))
    sums = [[name, "1", sha256(folder / f"{name}_1_all.deb")] for name in content]
    head = ["language", "udhr", "firefox", "libreoffice", "wesnoth"]
    tables = {
        "texts_languages.tsv": [head, ["de", "deu", "de", "", "de"], ["en", "eng", "en-gb", "", ""]],
        "texts_packages.tsv": [["package", "version", "sha256"], *sums],
    }
    monkeypatch.setattr(texts, "_table", tables.__getitem__)
    monkeypatch.setattr(texts_udhr, "SHA256", sha256(folder / texts_udhr.PACKAGE))
    return folder


def rows(output: Path) -> dict[str, list[dict[str, str]]]:
    return {
        split: [json.loads(line) for line in texts_path(output, split).read_text(encoding="utf-8").splitlines()]
        for split in ("train", "dev", "test")
    }


def key(row: dict[str, str]) -> str:
    """What the ids of translations share."""
    return row["id"].partition("-")[2].rpartition("-")[0]


def test_prepare(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path / "out", source=source)
    found = rows(tmp_path / "out")
    assert all(list(row) == ["text", "language", "source", "id"] for split in found.values() for row in split)
    assert {len(found[split]) > 0 for split in found} == {True}
    everything = [row for split in found.values() for row in split]
    counts = Counter((row["language"], row["source"]) for row in everything)
    assert counts["en", "udhr"] == counts["de", "udhr"] == 1
    assert 90 <= counts["de", "firefox"] <= 100
    assert len({row["id"] for row in everything}) == len(everything)
    for split in found.values():
        assert split == sorted(split, key=lambda row: (row["language"], row["id"]))
    left_out = (tmp_path / "out" / "left_out.tsv").read_text(encoding="utf-8").splitlines()
    assert left_out[0] == "language\tsource\treason\tsentences"
    assert "de\tfirefox\tnot translated\t1" in left_out
    assert "de\tfirefox\ttoo short\t1" in left_out
    printed = capsys.readouterr().out
    assert "MPL-2.0" in printed
    line = next(line.split() for line in printed.splitlines() if line.startswith("de "))
    assert line[:5] == ["de", "major", "gem", "gem", "latin"]
    german = [row["text"] for row in found["train"] if row["language"] == "de"]
    assert line[5:7] == [str(len(german)), str(sum(map(len, german)))]


def test_translations_share_a_split(source: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "out", source=source)
    splits: dict[str, set[str]] = {}
    for split, members in rows(tmp_path / "out").items():
        for row in members:
            splits.setdefault(key(row), set()).add(split)
    assert len(splits) > 90
    assert all(len(found) == 1 for found in splits.values())


def test_a_language_alone_has_the_same_tests(source: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "all", source=source)
    prepare(tmp_path / "de", languages=["de"], source=source)
    everything, german = rows(tmp_path / "all"), rows(tmp_path / "de")
    for split in everything:
        assert german[split] == [row for row in everything[split] if row["language"] == "de"]


def test_a_second_run_only_prints(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path / "out", source=source)
    first = capsys.readouterr().out
    prepare(tmp_path / "out", source=tmp_path / "nowhere")
    assert first.endswith(capsys.readouterr().out)
    with pytest.raises(MoleError, match="nowhere"):
        prepare(tmp_path / "out", languages=["de"], source=tmp_path / "nowhere")


def test_unknown_language_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="no language 'tlh'; choose from af, am"):
        prepare(tmp_path / "out", languages=["tlh"])


def text(words: str, language: str, name: str) -> Text:
    return Text(words, language, "s", f"{language}-{name}-{normal_form(words)}", name)


def test_what_is_tested_is_trained_on_nowhere() -> None:
    """Different originals whose translations are the same, even in another language."""
    names = {texts_split.split_of(str(number)): str(number) for number in range(200)}
    train, dev, test = names["train"], names["dev"], names["test"]
    texts = [
        text("The first of all originals", "en", test),
        text("Something else is written here", "en", dev),
        text("Nothing like it in the third", "en", train),
        text("Isto é o mesmo", "pt", test),
        text("Isto é o mesmo!", "pt", train),
        text("isto e o outro", "gl", dev),
        text("Isto e o outro", "gl", train),
        text("Isto é o mesmo", "gl", train),
        text("This is all the same", "pt", train),
    ]
    left_out: Counter[tuple[str, str, str]] = Counter()
    found = split_texts(texts, ["gl", "pt"], left_out)
    assert [row.text for row in found["test"]] == ["Isto é o mesmo"]
    assert [row.text for row in found["dev"]] == ["isto e o outro"]
    assert [row.text for row in found["train"]] == ["This is all the same"]
    assert left_out["pt", "s", "is in a higher split too"] == 1
    assert left_out["gl", "s", "is in a higher split too"] == 2


def test_repetitions_and_what_is_not_translated_are_left_out() -> None:
    texts = [
        text("Open the coloured window now", "en", "a"),
        text("Open the COLORED window now!", "fi", "b"),
        text("Avaa ikkuna heti", "fi", "a"),
        text("Avaa ikkuna: heti.", "fi", "c"),
    ]
    left_out: Counter[tuple[str, str, str]] = Counter()
    found = [row.id for split in split_texts(texts, ["fi"], left_out).values() for row in split]
    assert len(found) == 1
    assert dict(left_out) in (
        {("fi", "s", "not translated"): 1, ("fi", "s", "repetition"): 1},
        {("fi", "s", "not translated"): 1, ("fi", "s", "is in a higher split too"): 1},
    )


def test_every_language_is_placed() -> None:
    """Each has a source, letters to tell it by, a family and a branch."""
    languages = set(language_table())
    assert len(languages) >= 70
    assert set(MAJOR_LANGUAGES) <= languages
    assert {code for code in languages if family_of(code) == code} == {"eo", "eu", "hy", "ja", "ka", "kab", "ko", "sq"}
    branches = Counter(branch_of(code) for code in languages)
    assert not languages & set(branches)
    assert len(branches) == 16
    assert max(branches.values()) <= 14
    assert scripts_of("am") == {"ETHIOPIC"}
    assert all(sum(map(bool, codes.values())) for codes in language_table().values())


def test_every_package_is_pinned() -> None:
    pinned = {row[0] for row in texts._table("texts_packages.tsv")[1:]}
    codes = texts._codes(sorted(language_table()))
    named = {f"firefox-esr-l10n-{code}" for code in codes["firefox"].values()}
    named |= {f"libreoffice-l10n-{code}" for code in codes["libreoffice"].values()}
    assert pinned == named | set(texts_catalogues.CAMPAIGNS)


def test_normal_forms_of_the_packages_differ() -> None:
    """The messages above are not all near-duplicates, or every test above would be of one group."""
    forms = {f"{n}": [normal_form(message(ENGLISH, n, "We sail {}, then a {} time, at {}."))] for n in range(100)}
    assert len(set(texts_split.group_keys(forms).values())) > 20
