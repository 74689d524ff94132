"""Files of texts without speech: JSON lines with "text" and "language", as `mole-asr prepare texts` writes them."""

import json
from pathlib import Path

from mole_asr.corpus.manifest import first_entry
from mole_asr.errors import MoleError
from mole_asr.files import is_unicode


def read_texts(path: str | Path) -> dict[str, list[str]]:
    """The texts of a JSONL file by language, languages sorted, texts as they stand there; empty ones are left out.

    Args:
        path: one object a line, with at least "text" and "language" (`mole-asr prepare texts` writes such files).

    Raises:
        MoleError: the file cannot be read, or a line is something else.
    """
    texts: dict[str, list[str]] = {}
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")  # `splitlines` would cut at U+2028 too
    except OSError as error:
        raise MoleError(f"{path}: cannot be read ({error.strerror}); make it with `mole-asr prepare texts`") from None
    except UnicodeDecodeError:
        raise MoleError(f"{path}: is not UTF-8; make it with `mole-asr prepare texts`") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text, language = entry["text"], entry["language"]
            if not (isinstance(text, str) and isinstance(language, str) and is_unicode(text) and is_unicode(language)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise MoleError(f'{path}: line {number} is no JSON object with "text" and "language"') from None
        if text:
            texts.setdefault(language, []).append(text)
    return dict(sorted(texts.items()))


def holds_texts(path: str | Path) -> bool:
    """Whether a file's first filled line is a text, and no cut of a manifest; false for what cannot be read.

    Raises:
        MoleError: it is a pipe, which could not be read again.
    """
    return "text" in first_entry(path)
