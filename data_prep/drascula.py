"""Drascula, the vampire strikes back: a spoken adventure game in English (Debian's `drascula`).

Almost an hour, a handful of actors. Recordings are raw: a header of 32 bytes, then unsigned 8-bit samples at
11.025 kHz. Licence: freeware; it may be modified and redistributed without charge but not be sold by itself
(/usr/share/doc/drascula/copyright).

The texts end the file `drascula.dat`, whose numbers are big-endian uint16: the number of languages, then the tables;
each is the number of its strings and, for every language, the size in bytes and the strings. A string begins with its
length (which counts these two bytes and the padding to four) and ends with NUL. English is the first language.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from mole_asr.data_prep import debian
from mole_asr.data_prep.clips import Clip
from mole_asr.errors import MoleError

PACKAGES = {"drascula": "ed4af8e2d41ad446e2f3b73533daa1804e2f13f62f596c0b02b8dc39544f22b4"}
LICENCE = "freeware, not to be sold by itself"

# What the clips of a table are called; the tables behind these are not spoken.
_TABLES = ("", "D", "B", "BJ", "E", "I", "L", "P", "T", "VB")
_REMARK = re.compile(r"\([^)]*\)")
_HEADER_BYTES = 32
_SAMPLING_RATE_HZ = 11025


def clips(packages: Mapping[str, Path]) -> Iterator[Clip]:
    """Yields every recording; its text is None where the scripts lack it.

    Args:
        packages: package name -> its .deb file.

    Raises:
        MoleError: a package lacks the texts, or they cannot be read.
    """
    (package,) = (packages[name] for name in PACKAGES)
    texts, recordings = None, {}
    for name, content in debian.members(package):
        path = PurePosixPath(name)
        if path.suffix == ".ALS":
            recordings[path.stem] = content
        elif path.name == "drascula.dat":
            texts = read_texts(content)
    if texts is None:
        raise MoleError(f"{package}: it holds no texts (drascula.dat) that we can read; fetch version 1.0+ds4-2")
    for key, content in sorted(recordings.items()):
        text = _REMARK.sub(" ", texts[key]) if key in texts else None
        yield Clip("en", key, text, partial(_decode, content))


def read_texts(content: bytes) -> dict[str, str] | None:
    """Returns clip name -> text of `drascula.dat`, or None if there are no texts in it.

    The tables before the texts belong to the game and have formats of their own. The texts begin where all tables
    that follow end exactly with the file.
    """
    for start in range(len(content) - 4):
        tables = _tables(content, start)
        if len(tables) >= len(_TABLES):
            return {
                f"{name}{number}": text
                for name, table in zip(_TABLES, tables, strict=False)
                for number, text in enumerate(_strings(content, *table))
            }
    return None


def _tables(content: bytes, position: int) -> list[tuple[int, int]]:
    """Returns (where the first language's strings begin, how many), or nothing if no tables begin at `position`."""
    tables = []
    (languages,) = struct.unpack_from(">H", content, position)
    position += 2
    if not 1 <= languages <= 20:
        return []
    while position + 2 <= len(content):
        (count,) = struct.unpack_from(">H", content, position)
        position += 2
        tables.append((position + 2, count))
        for _ in range(languages):
            if position + 2 > len(content):
                return []
            position += 2 + struct.unpack_from(">H", content, position)[0]
    return tables if position == len(content) else []


def _strings(content: bytes, position: int, count: int) -> Iterator[str]:
    """Yields the strings of a table; two bytes stand before the first."""
    position += 2
    for _ in range(count):
        (length,) = struct.unpack_from(">H", content, position)
        yield content[position + 2 : position + length].split(b"\0")[0].decode("cp437")
        position += length


def _decode(content: bytes) -> tuple[np.ndarray, int]:
    samples_S = np.frombuffer(content, dtype=np.uint8, offset=_HEADER_BYTES)
    return (samples_S.astype(np.float32) - 128) / 128, _SAMPLING_RATE_HZ
