"""Spoken names of the pictures in a drawing program for children (Debian's `tuxpaint-stamps-default`).

2.4 hours, one volunteer a language, recorded at home: Belarusian, Bulgarian, Catalan, Danish, Greek, Spanish, French,
Romanian, Russian, a few English ones. Ogg Vorbis; the Spanish recordings are clipped, the Bulgarian ones quiet.
Licence: GPL-2 (/usr/share/doc/tuxpaint-stamps-default/copyright).

A picture `NAME` has `NAME.txt` (UTF-8): the first line is English, the others are `XX.utf8=text` for language XX; its
recordings are `NAME_desc.ogg` (English) and `NAME_desc_XX.ogg`. Amounts in figures, which repeat in brackets what
stands before them, are not read aloud.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from mole_asr.data_prep import debian
from mole_asr.data_prep.clips import Clip, decode

PACKAGES = {"tuxpaint-stamps-default": "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"}
LICENCE = "GPL-2"

_FOLDER = "usr/share/tuxpaint/stamps/"
_SOUND = re.compile(rf"{_FOLDER}(?P<key>.+)_desc(_(?P<language>[a-z]+))?\.ogg")
_AMOUNT = re.compile(r"\([\d\s.,]*[$€¥][\d\s.,]*\)")
_TEXT = re.compile(rf"{_FOLDER}(?P<key>.+)\.txt")


def clips(packages: Mapping[str, Path]) -> Iterator[Clip]:
    """Yields the recordings that have a text.

    Args:
        packages: package name -> its .deb file.

    Raises:
        MoleError: the package or a recording cannot be unpacked.
    """
    (package,) = (packages[name] for name in PACKAGES)
    texts: dict[str, dict[str, str]] = {}
    recordings = []
    for name, content in debian.members(package):
        if match := _TEXT.fullmatch(name):
            texts[match["key"]] = read_texts(content.decode("utf-8"))
        elif match := _SOUND.fullmatch(name):
            recordings.append((match["language"] or "en", match["key"], content))
    for language, key, content in recordings:
        text = texts.get(key, {}).get(language)
        yield Clip(language, key, text, partial(decode, content, f"{package}: {key} ({language})"))


def read_texts(content: str) -> dict[str, str]:
    """Returns language -> spoken text of a picture's `.txt` file."""
    english, *lines = content.splitlines() or [""]
    texts = dict(line.split(".utf8=", 1) for line in lines if ".utf8=" in line)
    return {language: _AMOUNT.sub(" ", text) for language, text in {"en": english, **texts}.items()}
