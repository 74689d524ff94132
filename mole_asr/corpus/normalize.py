"""The one text normalisation of the toolkit: training targets and both sides of a score pass through it."""

import re
import unicodedata
from contextlib import suppress
from functools import lru_cache

# Signs that belong to the spelling of a word when they stand between two letters. The apostrophe does so in every
# language (l'eau, don't, о'кей, п'ять); quotation marks that look like it stand at the edge of a word and are dropped.
_APOSTROPHES = dict.fromkeys(map(ord, "\u2019\u2018\u02bc\u02b9\u2032\uff07`\u00b4"), "'")
_INNER_SIGNS = {"ca": "'·", "he": "'׳״"}
_JOINERS = "\u200c\u200d"  # within Persian and Indic words they are spelling; elsewhere they are invisible noise
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_DECIMAL_POINT = frozenset({"en", "he", "ja", "ko", "th", "zh"})  # here 1,000.5; elsewhere 1.000,5
_BROKEN = frozenset({"am"})  # num2words never returns for some Amharic numbers
# num2words reads fractions of these wrongly (2.05 as 2.5 or two point four, 0.5 as fifty); they are read by digits.
_POINTS = {"ar": "فاصلة", "bn": "দশমিক", "fa": "ممیز", "tr": "virgül", "vi": "phẩy"}
_MAX_DIGITS = 9  # a longer number is a telephone number or the like: digit by digit


def normalize(text: str, language: str, fold_accents: bool = False) -> str:
    """Brings a sentence to the form in which it is learnt and scored.

    NFC; lower case; digits spelled out in the language (kept as they are where num2words does not know the
    language); punctuation and symbols become spaces, except apostrophes inside a word; white space is squeezed.
    Combining marks (Unicode categories M*) are always kept: without them Hindi, Thai or vocalised Arabic lose
    vowels, and the score flatters. Applying it twice changes nothing more.

    Args:
        text: any text.
        language: its code; decides how numbers are read and which signs belong to words.
        fold_accents: also strip diacritics (é -> e, ñ -> n), for corpora whose transcripts lack them.
    """
    text = "".join(c for c in text if c in _JOINERS or unicodedata.category(c) not in ("Cf", "Cs"))
    text = unicodedata.normalize("NFC", text).translate(_APOSTROPHES)
    if language.split("-")[0] in ("tr", "az"):
        text = text.replace("I", "ı").replace("İ", "i")
    text = _spell_numbers(text.lower(), language)
    inner = _INNER_SIGNS.get(language.split("-")[0], "'") + _JOINERS
    kept = [c if _is_word_character(c) or _joins(text, i, inner) else " " for i, c in enumerate(text)]
    text = "".join(kept)
    text = without_accents(text) if fold_accents else unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def without_accents(text: str) -> str:
    """Strips the marks of Latin, Greek and Cyrillic letters alone: a Hindi vowel sign is no accent."""
    text = "".join(c for c in unicodedata.normalize("NFD", text) if not "\u0300" <= c <= "\u036f")
    return unicodedata.normalize("NFC", text)


def _is_word_character(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"


def _joins(text: str, index: int, inner: str) -> bool:
    """Whether the sign at `index` stands between two word characters and belongs to the word."""
    if text[index] not in inner or not 0 < index < len(text) - 1:
        return False
    return _is_word_character(text[index - 1]) and _is_word_character(text[index + 1])


def _spell_numbers(text: str, language: str) -> str:
    if not any(c.isdecimal() for c in text) or (code := _num2words_code(language)) is None:
        return text

    def words(match: re.Match[str]) -> str:
        spelled = " ".join(_number_words(part, code) for part in _split_number(match[0], language))
        # "3a" is two words, but "l'11" keeps its apostrophe.
        before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        return " " * before.isalnum() + spelled + " " * after.isalnum()

    return _NUMBER.sub(words, text).lower()


@lru_cache
def _num2words_code(language: str) -> str | None:
    """The name under which num2words knows a language, or None."""
    from num2words import CONVERTER_CLASSES  # takes a while to import, and many texts have no digits

    code = language.replace("-", "_")
    return next((c for c in (code, code.split("_")[0]) if c in CONVERTER_CLASSES and c not in _BROKEN), None)


def _split_number(number: str, language: str) -> list[str]:
    """Reads separators as the language writes them: "10,000" -> ["10000"], "1.6" -> ["1.6"], "1.6.1" -> 1, 6, 1."""
    number = "".join(str(int(c)) if c.isdecimal() else c for c in number)  # other scripts' digits too
    point, group = (".", ",") if language.split("-")[0] in _DECIMAL_POINT else (",", ".")
    if re.fullmatch(rf"[1-9]\d{{0,2}}(\{group}\d{{3}})+(\{point}\d+)?", number):
        number = number.replace(group, "")
    parts = re.split(r"[.,]", number)
    # Authors of software texts write 1.6 in every language, so either sign is read as the decimal one.
    return [".".join(parts)] if len(parts) == 2 else parts


@lru_cache(maxsize=4096)
def _number_words(number: str, code: str) -> str:
    from num2words import num2words

    whole, _, fraction = number.partition(".")
    digits = [num2words(int(digit), lang=code) for digit in whole + fraction]
    if code in _POINTS and fraction.strip("0"):
        return " ".join([_number_words(whole, code), _POINTS[code], *digits[len(whole) :]])
    is_tiny = 0 < float(number) < 1e-4  # Python writes 1e-05, which num2words cannot read
    if not is_tiny and len(whole) <= _MAX_DIGITS and (len(whole) == 1 or whole[0] != "0") and len(fraction) <= 6:
        with suppress(KeyError, ValueError, IndexError):  # num2words has holes, such as Hungarian 3.14159
            return num2words(float(number) if fraction.strip("0") else int(whole), lang=code)
    return " ".join(digits)
