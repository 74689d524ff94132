"""The messages of a web browser: Debian's `firefox-esr-l10n-*`, 0.3 to 0.6 MB a language. Licence: MPL-2.0.

Each package holds a language pack (`.xpi`, a zip archive) with Fluent files (`.ftl`) and `.properties` files. Fluent
(https://projectfluent.org/fluent/guide/):

    -brand = Firefox
    greeting = Welcome to { -brand }
        .title = A text
            that goes on
    tabs = { $count ->
        [one] One tab
       *[other] Some tabs
    }

Names of messages and terms in braces are replaced by their texts (in the grammatical case that is asked for),
alternatives by the default one (`*`). A message
that needs anything else (a variable, a number, a date) has a hole, and is passed over. What a translator has not
translated is in the pack in English.
"""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from mole_asr.data_prep import debian
from mole_asr.data_prep.texts_files import Entry
from mole_asr.errors import MoleError

LICENCE = "MPL-2.0"
ENGLISH = "en-gb"

_START = re.compile(r"(?P<name>-?[A-Za-z][\w-]*) *=(?P<text>.*)")
_ATTRIBUTE = re.compile(r" +\.(?P<name>[A-Za-z][\w-]*) *=(?P<text>.*)")
_REFERENCE = re.compile(r"(?P<name>-?[A-Za-z][\w-]*(?:\.[A-Za-z][\w-]*)?)(?:\((?P<arguments>.*)\))?", re.DOTALL)
_ARGUMENT = re.compile(r"([\w-]+)\s*:\s*\"([^\"]*)\"")
_SELECT = re.compile(r"(?:\$(?P<name>[\w-]+)|[^{}\"]*?(?:\([^()]*\))?)\s*->")
_LITERAL = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"\s*\}')
_VARIANT = re.compile(r"^[ \t]*(?P<default>\*?)\[ *(?P<name>[\w.-]+) *\]", re.MULTILINE)
_PROPERTY = re.compile(r"(?P<name>[\w.-]+)\s*[=:]\s*(?P<text>.*)")
# No texts but keys to press, sizes, names of icons.
_NO_TEXT = re.compile(r"access-?key|command-?key|\.(key|keycode|style)$|searchkeywords", re.IGNORECASE)


def package_name(code: str) -> str:
    """Name of the package of a language, by its code in Debian (`pt-br`)."""
    return f"firefox-esr-l10n-{code}"


def entries(packages: Mapping[str, Path], codes: Mapping[str, str]) -> Iterator[Entry]:
    """Yields the messages of the chosen languages; the key is the file and the name of the message.

    Args:
        packages: package name -> its .deb file.
        codes: language -> code in Debian.

    Raises:
        MoleError: a package cannot be read.
    """
    for language, code in codes.items():
        path = packages[package_name(code)]
        packs = [content for name, content in debian.members(path) if name.endswith(".xpi")]
        if len(packs) != 1:
            raise MoleError(f"{path}: {len(packs)} language packs instead of one")
        yield from (Entry("firefox", language, *row) for row in read_pack(packs[0], str(path)))


def read_pack(content: bytes, name: str) -> Iterator[tuple[str, str, bool]]:
    """Yields (key, text, whether backslashes escape) of the messages in a language pack.

    Raises:
        MoleError: it is no zip archive.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {name: archive.read(name).decode("utf-8") for name in sorted(archive.namelist()) if _is_text(name)}
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise MoleError(f"{name}: a language pack that cannot be read ({error})") from None
    fluent = {name: parse_fluent(text) for name, text in files.items() if name.endswith(".ftl")}
    terms = {key: text for messages in fluent.values() for key, text in messages.items() if key.startswith("-")}
    for file, messages in fluent.items():
        known, place = {**terms, **messages}, _place(file)
        for key, pattern in messages.items():
            text = None if key.startswith("-") or _NO_TEXT.search(key) else resolve(pattern, known)
            if text is not None:
                yield f"{place}/{key}", text, False
    for file, text in files.items():
        if file.endswith(".properties"):
            place = _place(file)
            rows = parse_properties(text).items()
            yield from ((f"{place}/{key}", value, True) for key, value in rows if not _NO_TEXT.search(key))


def parse_fluent(text: str) -> dict[str, str]:
    """Returns name (`id`, `id.attribute`, `-term`) -> pattern, not resolved, of a Fluent file."""
    messages: dict[str, list[str]] = {}
    current: list[str] = []
    message, depth = "", 0
    for line in _LITERAL.sub(_literal, text).splitlines():
        if match := _START.match(line):
            message, depth = match["name"], 0
            current = messages[message] = [match["text"].strip()]
        elif depth <= 0 and (match := _ATTRIBUTE.match(line)):
            current = messages[f"{message}.{match['name']}"] = [match["text"].strip()]
        elif line[:1] in (" ", "}", ""):
            current.append(line)
        else:  # a comment, which also ends a message
            current = []
        depth += _depth(line)
    patterns = {name: "\n".join(lines).strip() for name, lines in messages.items()}
    return {name: pattern for name, pattern in patterns.items() if pattern}


def resolve(
    pattern: str, known: Mapping[str, str], arguments: Mapping[str, str] = MappingProxyType({}), depth: int = 0
) -> str | None:
    """Returns the text of a Fluent pattern, or None where it has a hole.

    Args:
        pattern: as from `parse_fluent`.
        known: name -> pattern, of the messages and terms that it may name.
        arguments: what a term is given where it is named: `-brand(case: "genitive")`.
        depth: of references, which must not go in circles.
    """
    parts, position = [], 0
    while (opening := pattern.find("{", position)) >= 0:
        closing = _closing(pattern, opening)
        value = _placeable(pattern[opening + 1 : closing].strip(), known, arguments, depth)
        if value is None:
            return None
        parts += [pattern[position:opening], value]
        position = closing + 1
    text = "".join([*parts, pattern[position:]])
    return "\n".join(line.strip() for line in text.split("\n")).strip()


def parse_properties(text: str) -> dict[str, str]:
    """Returns name -> text, with its escapes, of a Java-like properties file."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    matches = (_PROPERTY.fullmatch(line.strip()) for line in lines if line.lstrip()[:1] not in ("#", "!"))
    return {match["name"]: match["text"] for match in matches if match}


def _literal(match: re.Match[str]) -> str:
    """What is quoted in braces; a hole if that is braces or escapes themselves, which no sentence has."""
    return "{ $literal }" if re.search(r"[{}\\]", match[1]) else match[1]


def _placeable(inner: str, known: Mapping[str, str], arguments: Mapping[str, str], depth: int) -> str | None:
    """The text of what stands between braces, or None."""
    if match := _SELECT.match(inner):
        variant = _variant(inner[match.end() :], arguments.get(match["name"] or "", ""))
        return None if variant is None else resolve(variant, known, arguments, depth)
    if (match := _REFERENCE.fullmatch(inner)) and match["name"] in known and depth < 5:
        given = dict(_ARGUMENT.findall(match["arguments"] or ""))
        return resolve(known[match["name"]], known, given, depth + 1)
    return None


def _variant(variants: str, wanted: str) -> str | None:
    """The pattern behind `[wanted]`, or else behind `*[...]`; brackets within braces are not alternatives."""
    starts = [match for match in _VARIANT.finditer(variants) if _depth(variants[: match.start()]) == 0]
    ends = [*(match.start() for match in starts[1:]), len(variants)]
    found = {match["name"]: variants[match.end() : end].strip() for match, end in zip(starts, ends, strict=True)}
    default = next((match["name"] for match in starts if match["default"]), "")
    return found.get(wanted, found.get(default))


def _closing(pattern: str, opening: int) -> int:
    """Where the brace at `opening` is closed; the end of the pattern if nowhere."""
    depth = 0
    for position in range(opening, len(pattern)):
        depth += (pattern[position] == "{") - (pattern[position] == "}")
        if depth == 0:
            return position
    return len(pattern)


def _depth(text: str) -> int:
    return text.count("{") - text.count("}")


def _is_text(name: str) -> bool:
    return name.endswith((".ftl", ".properties"))


def _place(file: str) -> str:
    """The file's path without the language: `browser/localization/fr/a.ftl` -> `browser/localization/a.ftl`."""
    parts = PurePosixPath(file).parts
    locales = {parts[i + 1] for i, part in enumerate(parts[:-1]) if part in ("localization", "chrome")}
    return "/".join(part for part in parts if part not in locales)
