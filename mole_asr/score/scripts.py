"""Writing systems: does a hypothesis use the letters of its language?"""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from mole_asr.corpus.languages import is_known_language
from mole_asr.score.pairs import Pair

# Other languages that we know are written in Latin letters. The names are first words of Unicode's character names.
_SCRIPTS = {
    "CYRILLIC": "ba be bg ce kk ky mk mn ru tg tt uk",
    "CYRILLIC LATIN": "sr uz",
    "GREEK": "el",
    "ARABIC": "ar ckb fa ps sd ug ur",
    "ARABIC LATIN": "ku",
    "HEBREW": "he yi",
    "THAANA": "dv",
    "DEVANAGARI": "hi mr ne",
    "BENGALI": "as bn",
    "GUJARATI": "gu",
    "GURMUKHI ARABIC": "pa",
    "ORIYA": "or",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "TAMIL": "ta",
    "TELUGU": "te",
    "SINHALA": "si",
    "THAI": "th",
    "LAO": "lo",
    "KHMER": "km",
    "MYANMAR": "my",
    "TIBETAN": "bo",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "ETHIOPIC": "am ti",
    "HANGUL": "ko",
    "CJK": "yue zh",
    "CJK HIRAGANA KATAKANA": "ja",
}
_OF_LANGUAGE = {code: frozenset(names.split()) for names, codes in _SCRIPTS.items() for code in codes.split()}
_LATIN = frozenset({"LATIN"})


@lru_cache(maxsize=4096)
def script_of(character: str) -> str:
    """First word of a letter's Unicode name, which for letters is its script.

    Empty for whatever is no letter, and for signs that go with letters of several scripts: those that lengthen, repeat
    or modify them, and raised ª and º.
    """
    category = unicodedata.category(character)
    if category[0] != "L" or category == "Lm" or character in "ªº":
        return ""
    name = unicodedata.name(character, "").split()
    # "FULLWIDTH LATIN ..." and the like have the script second.
    return next((word for word in name if word not in ("FULLWIDTH", "HALFWIDTH")), "")


def scripts_of(language: str) -> frozenset[str] | None:
    """Scripts that a language is written in, None where we do not know; the code counts up to a hyphen."""
    code = language.partition("-")[0]
    return _OF_LANGUAGE.get(code, _LATIN if is_known_language(code) else None)


def wrong_script_share(pairs: Iterable[Pair]) -> float | None:
    """Share (0 to 1) of the hypotheses' letters that are of no script of the reference's language.

    None without any letter. Languages whose script we do not know are left out.
    """
    letters = wrong = 0
    for pair in pairs:
        if (known := scripts_of(pair.language)) is None:
            continue
        found = [script for script in map(script_of, pair.hypothesis) if script]
        letters += len(found)
        wrong += sum(script not in known for script in found)
    return wrong / letters if letters else None
