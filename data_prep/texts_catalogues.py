"""GNU gettext catalogues (`.mo`: English text -> translation) in Debian's packages: story and dialogue, office work.

`wesnoth-1.16-*`: campaigns of a strategy game, all languages in each package. Licence: GPL-2+
(/usr/share/doc/wesnoth-1.16-did/copyright). `libreoffice-l10n-*`: the messages of an office suite, a package a
language, for languages of which the other sources have little. Licence: MPL-2.0.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from mole_asr.data_prep import debian
from mole_asr.data_prep.texts_files import Entry
from mole_asr.errors import MoleError

LICENCES = {"wesnoth": "GPL-2+", "libreoffice": "MPL-2.0"}
CAMPAIGNS = ("wesnoth-1.16-did", "wesnoth-1.16-dw", "wesnoth-1.16-l")

_WESNOTH = re.compile(r"usr/share/games/wesnoth/1\.16/locale/(?P<locale>[^/]+)/LC_MESSAGES/wesnoth-\w+\.mo")
_LIBREOFFICE = re.compile(r"usr/lib/libreoffice/program/resource/[^/]+/LC_MESSAGES/\w+\.mo")
_MAGIC = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}


def wesnoth(packages: Mapping[str, Path], locales: Mapping[str, str]) -> Iterator[Entry]:
    """Yields the translations in the chosen languages, then all English texts; the key is the English text.

    Args:
        packages: package name -> its .deb file.
        locales: language -> locale (`pt_BR`).

    Raises:
        MoleError: a package or a catalogue cannot be read.
    """
    languages = {locale: language for language, locale in locales.items()}
    english: dict[str, None] = {}
    for path in (packages[name] for name in CAMPAIGNS):
        for name, content in debian.members(path):
            if match := _WESNOTH.fullmatch(name):
                rows = read_catalogue(content, f"{path}: {name}")
                english.update(dict.fromkeys(original for original, _ in rows))
                if language := languages.get(match["locale"]):
                    yield from (Entry("wesnoth", language, original, _shown(text)) for original, text in rows)
    # Of all languages, whichever are chosen: the English texts decide about the splits.
    yield from (Entry("wesnoth", "en", original, _shown(original)) for original in english)


def libreoffice_package(code: str) -> str:
    """Name of the package of a language, by its code in Debian (`en-gb`)."""
    return f"libreoffice-l10n-{code}"


def libreoffice(packages: Mapping[str, Path], codes: Mapping[str, str]) -> Iterator[Entry]:
    """Yields the messages in the chosen languages; the key is the English text.

    Args:
        packages: package name -> its .deb file.
        codes: language -> code in Debian.

    Raises:
        MoleError: a package or a catalogue cannot be read.
    """
    for language, code in codes.items():
        path = packages[libreoffice_package(code)]
        for name, content in debian.members(path):
            if _LIBREOFFICE.fullmatch(name):
                rows = read_catalogue(content, f"{path}: {name}")
                yield from (Entry("libreoffice", language, original, _named(text)) for original, text in rows)


def read_catalogue(content: bytes, name: str) -> list[tuple[str, str]]:
    """Returns (English, translation) of the entries of a `.mo` file; those with plural forms are passed over.

    The layout is in the gettext manual, "The Format of GNU MO Files": magic number, revision, number of strings, and
    the offsets of two tables of (length, offset), of the originals and of the translations.

    Args:
        content: of the file.
        name: for the message.

    Raises:
        MoleError: it is no such file.
    """
    try:
        order = _MAGIC[content[:4]]
        count, *tables = struct.unpack_from(f"{order}3I", content, 8)
        columns = [struct.unpack_from(f"{order}{2 * count}I", content, table) for table in tables]
        texts = [
            [content[at : at + size].decode("utf-8") for size, at in zip(column[::2], column[1::2], strict=True)]
            for column in columns
        ]
    except (KeyError, struct.error, UnicodeDecodeError) as error:
        raise MoleError(f"{name}: no catalogue of translations in UTF-8 ({error!r}); fetch it again") from None
    pairs = zip(*texts, strict=True)
    # The empty original is the file's head; what stands before U+0004 is the context of an original.
    return [(a.rpartition("\4")[2], b) for a, b in pairs if a and b and "\0" not in a]


def _shown(text: str) -> str:
    """Without what stands before a caret: a note to translators, which some of them copy."""
    return text.rpartition("^")[2]


def _named(text: str) -> str:
    """With the program's name, which distributors may change."""
    return text.replace("%PRODUCTNAME", "LibreOffice").replace("~", "")
