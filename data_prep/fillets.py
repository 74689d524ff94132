"""Fish Fillets: a spoken puzzle game in Czech and Dutch (Debian's `fillets-ng-data-cs`, `-nl`, `fillets-ng-data`).

Three hours: two fish, who talk in every level, and minor actors in Czech; a few English words are in the game itself.
Recordings are Ogg Vorbis. Licence: GPL-2 (/usr/share/doc/fillets-ng-data/copyright).

Texts stand in Lua scripts, one a level and language: `dialogId("key", "font", "English")` and behind it
`dialogStr("text")` in the script's language; English scripts have the first alone. The font is the speaker.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from mole_asr.data_prep import debian
from mole_asr.data_prep.clips import Clip, decode

PACKAGES = {
    "fillets-ng-data": "25de89afd8b1adf7bcace8290248a6a22c89cd42300317e69000e162c032cf84",
    "fillets-ng-data-cs": "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14",
    "fillets-ng-data-nl": "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10",
}
LICENCE = "GPL-2"

_SCRIPT = re.compile(r"usr/share/games/fillets-ng/script/(?P<level>[^/]+)/\w*dialogs_(?P<language>[a-z]{2})\.lua")
_SOUND = re.compile(r"usr/share/games/fillets-ng/sound/(?P<level>.+)/(?P<language>[a-z]{2})/(?P<name>[^/]+)\.ogg")
_STRING = r'"((?:[^"\\]|\\.)*)"'
_CALL = re.compile(rf"^\s*(?:dialogId\(\s*{_STRING}\s*,\s*{_STRING}\s*,\s*{_STRING}|dialogStr\(\s*{_STRING})", re.M)
_ESCAPE = re.compile(r"\\(.)")


def clips(packages: Mapping[str, Path]) -> Iterator[Clip]:
    """Yields every recording; a key is the level (with the folder of jokes below `share`) and the name.

    Args:
        packages: package name -> its .deb file.

    Raises:
        MoleError: a package or a recording cannot be unpacked.
    """
    texts: dict[tuple[str, str, str], str] = {}
    waiting = []  # recordings in the package of the scripts stand before these
    for package in PACKAGES:
        for path, content in debian.members(packages[package]):
            if script := _SCRIPT.fullmatch(path):
                for key, text in read_script(content.decode("utf-8"), script["language"]).items():
                    texts[script["level"], script["language"], key] = text
            elif sound := _SOUND.fullmatch(path):
                waiting.append((sound, content))
        for found, content in waiting:
            level, language, name = found["level"], found["language"], found["name"]
            spoken = texts.get((level.split("/")[0], language, name))
            yield Clip(language, f"{level}/{name}", spoken, partial(decode, content, f"{packages[package]}: {name}"))
        waiting.clear()


def read_script(script: str, language: str) -> dict[str, str]:
    """Returns key -> text in `language` of the dialogues in a Lua script."""
    texts = {}
    key = ""
    for dialogue_key, _, english, text in _CALL.findall(script):
        if dialogue_key:
            key = dialogue_key
        if (dialogue_key and language == "en") or (not dialogue_key and language != "en"):
            texts[key] = _ESCAPE.sub(r"\1", english if dialogue_key else text)
    return texts
