"""Sentences read by one Russian speaker, recorded for a speech synthesizer (Debian's `festvox-ru`).

1.7 hours, 16 kHz, from Alexei Tolstoy's "Aelita" and others. Licence: BSD-like
(/usr/share/doc/festvox-ru/copyright).

A line of `etc/txt.done.data` is `( ru_0001 "Text." )`. A `+` stands before a stressed vowel that the reader might get
wrong; commas stand where the speaker pauses.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from mole_asr.data_prep import debian
from mole_asr.data_prep.clips import Clip, decode
from mole_asr.errors import MoleError

PACKAGES = {"festvox-ru": "21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4"}
LICENCE = "BSD-like"

_LINE = re.compile(r'\(\s*(\w+)\s+"(.*)"\s*\)')


def clips(packages: Mapping[str, Path]) -> Iterator[Clip]:
    """Yields the sentences.

    Args:
        packages: package name -> its .deb file.

    Raises:
        MoleError: the package lacks the transcripts or cannot be unpacked.
    """
    (package,) = (packages[name] for name in PACKAGES)
    texts, recordings = None, {}
    for name, content in debian.members(package):
        path = PurePosixPath(name)
        if path.name == "txt.done.data":
            texts = read_transcripts(content.decode("utf-8"))
        elif path.suffix == ".wav":
            recordings[path.stem] = content
    if texts is None:
        raise MoleError(f"{package}: it holds no txt.done.data; fetch version 0.5+dfsg-6")
    for key, content in sorted(recordings.items()):
        yield Clip("ru", key, texts.get(key), partial(decode, content, f"{package}: {key}.wav"))


def read_transcripts(content: str) -> dict[str, str]:
    """Returns key -> text without stress marks."""
    return {key: text.replace("+", "") for key, text in _LINE.findall(content)}
