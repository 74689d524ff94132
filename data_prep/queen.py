"""Flight of the Amazon Queen: a spoken adventure game in English (Debian's `flight-of-the-amazon-queen`).

About three hours and more than twenty characters, of which the hero, Joe, speaks almost half. Recordings are MP3 at
11.025 kHz. Licence: freeware; it may be modified and redistributed without charge but not be sold by itself
(/usr/share/doc/flight-of-the-amazon-queen/copyright).

All files of the game lie in one archive, `queen.1c`, whose numbers are big-endian: from byte 13 the number of files,
then 21 bytes a file (name, kind, offset, size). The texts stand in

- `*.DOG`, the dialogues: what Joe and the person whom he talks to say, each line with a number;
- `QUEEN2.JAS`, a list of lines of text, among which are Joe's remarks about what he sees.

Actors' cues, `*` and two characters, cut a line into segments, and each segment is a clip (`*.SB`).
"""

import re
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from mole_asr.data_prep import debian
from mole_asr.data_prep.clips import Clip, decode
from mole_asr.errors import MoleError

PACKAGES = {"flight-of-the-amazon-queen": "40c08fd258d6fe95c46c1eaf5e9137f84ba330657995a281bd887c94a560a0f1"}
LICENCE = "freeware, not to be sold by itself"

_CUE = re.compile(r"\*..")
_DIALOGUE_HEADER_BYTES = 20
# Of Joe's remarks, the first 41 stand late in the list of texts and the others begin it.
_FIRST_REMARKS, _FIRST_REMARKS_LINE = 41, 1186


def clips(packages: Mapping[str, Path]) -> Iterator[Clip]:
    """Yields every recording; its text is None where the game has none.

    Args:
        packages: package name -> its .deb file.

    Raises:
        MoleError: a package lacks the archive, or the archive is damaged.
    """
    (package,) = (packages[name] for name in PACKAGES)
    archive = next((content for name, content in debian.members(package) if name.endswith("/queen.1c")), None)
    if archive is None:
        raise MoleError(f"{package}: it holds no queen.1c; fetch version 1.0.0-9")
    try:
        files = unpack(archive)
        texts = _texts(files)
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise MoleError(f"{package}: its queen.1c is damaged ({error}); fetch it again") from None
    for name, content in files.items():
        key = name.removesuffix(".SB")
        if key != name:
            yield Clip("en", key, texts.get(key), partial(decode, content, f"{package}: {name}"))


def unpack(archive: bytes) -> dict[str, bytes]:
    """Returns name -> content of the files in `queen.1c`; raises struct.error where it ends too early."""
    files = {}
    (count,) = struct.unpack_from(">H", archive, 13)
    for position in range(15, 15 + 21 * count, 21):
        name, offset, size = struct.unpack_from(">12sxII", archive, position)
        files[name.split(b"\0")[0].decode("ascii")] = archive[offset : offset + size]
        if offset + size > len(archive):
            raise struct.error(f"it ends within {name!r}")
    return files


def dialogue(content: bytes) -> dict[str, str]:
    """Returns clip name -> text of the dialogue in a `.DOG` file."""
    content = content[_DIALOGUE_HEADER_BYTES:]
    levels, _, talk_key, joe_count, person_count = struct.unpack_from(">5h", content)
    (person_offset,) = struct.unpack_from(">h", content, 22)
    texts = {}
    for letter, offset, count in (("J", 32 + abs(levels) * 96, joe_count), ("P", person_offset, person_count)):
        for number, line in _records(content, offset, count):
            prefix = f"{talk_key:2d}{number:4x}"
            prefix = prefix[:5].replace(" ", "0") + prefix[5:]
            texts.update(segments(f"{prefix}{letter}", line))
    return texts


def segments(prefix: str, line: str) -> dict[str, str]:
    """Cuts a line at its cues: clip name (prefix and number of the segment, hexadecimal, from 1) -> text."""
    return {f"{prefix}{n:x}".upper(): text for n, text in enumerate(_CUE.split(line), 1) if text.strip()}


def _records(content: bytes, offset: int, count: int) -> Iterator[tuple[int, str]]:
    """Yields number and text of dialogue lines: two bytes, the number, a Pascal string, padded to four bytes."""
    for _ in range(count):
        number, length = struct.unpack_from(">2xhB", content, offset)
        start = offset + 5
        yield number, content[start : start + length].decode("cp437")
        offset = -(-(start + length) // 4) * 4


def _texts(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns clip name -> text."""
    texts = {}
    lines = files["QUEEN2.JAS"].decode("cp437").splitlines()
    for number in range(len(lines) + _FIRST_REMARKS):
        late = number < _FIRST_REMARKS
        line = number + _FIRST_REMARKS_LINE if late else number - _FIRST_REMARKS
        if line < len(lines):
            texts.update(segments(f"JOE{number:04d}", lines[line]))
    for name, content in files.items():
        if name.endswith(".DOG"):
            texts.update(dialogue(content))
    return texts
