"""Catalogue entries to plain sentences: markup, escapes and accelerators off, entries with holes refused.

Case, punctuation and digits stay: these texts are for language models. (Recognition has `corpus/normalize.py`.)
"""

import html
import re
import unicodedata
from collections import Counter

from mole_asr.score.scripts import script_of, scripts_of

MIN_WORDS = 3
MIN_LETTERS = 6  # where words are not parted by spaces
_UNSPACED = frozenset("CJK HIRAGANA KATAKANA THAI LAO KHMER MYANMAR TIBETAN".split())  # noqa: SIM905 (as a list is)
_JOINERS = "\u200c\u200d"  # spelling in Persian and Indic words

_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\n", "t": " "}
_BREAK = re.compile(r"<(?:br|p|li|div)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->", re.DOTALL)
# East Asian catalogues put the key that a menu item is reached with in brackets behind it: 新建(&N)
_KEY_IN_BRACKETS = re.compile(r"\s?[(（][&~_][A-Za-z0-9][)）]")
_KEY = re.compile(r"(?<!\w)[&_](?=\w)|(?<=\w)&(?=\w)")
# What a program fills in: %s %1$S %d %(name)s %1, $name, ${x} {name} {0}, #1, @name@
_HOLE = re.compile(r"%(?:\d+\$)?[a-zA-Z@]|%\(|%\d|\$[\w({]|[{}]|#\d|@\w+@|\[\[")
_ADDRESS = re.compile(r"\w://|\bwww\.|\babout:|\bchrome:|\w@\w+\.\w|</|/>|\bhttps?:")

_CLOSING = "\"'”’»›“)\\]」』）"
# A sentence ends at its mark, with what closes behind it; Latin full stops only before a space and no small letter.
_END = re.compile(rf"(?<=[。！？])[{_CLOSING}]*|(?<=[.!?…।॥؟۔։።၊။])[{_CLOSING}]*\s+|\n+")
_NUMBERING = re.compile(r"^(?:[-–—•*·]+|[(（]?(?:\d{1,3}|[a-z]|[ivx]+)[.)）])\s+", re.IGNORECASE)


def plain(raw: str, escapes: bool = False) -> str:
    """Strips markup, escapes and menu keys; NFC, no invisible characters. Lines are kept apart.

    Args:
        raw: an entry as its catalogue has it.
        escapes: whether backslashes escape, as in `.properties` files.
    """
    text = _ESCAPE.sub(_unescaped, raw) if escapes else raw
    text = html.unescape(_TAG.sub("", _BREAK.sub("\n", text)))
    text = _KEY.sub("", _KEY_IN_BRACKETS.sub("", text))
    text = unicodedata.normalize("NFC", text.replace("\t", " ").translate(_VISIBLE))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def sentences(text: str) -> list[str]:
    """Cuts a plain text into sentences: at line ends and behind closing marks of every script.

    "e.g. this" is not cut, since a small letter follows, nor what brackets hold together; numbering ("1.", "(a)") at
    the head of a sentence is dropped.
    """
    cuts, start = [], 0
    for match in _END.finditer(text):
        sentence, following = text[start : match.end()], text[match.end() : match.end() + 1]
        numbering = _NUMBERING.fullmatch(sentence.lstrip())
        goes_on = following.islower() or sentence.count("(") > sentence.count(")") or numbering
        if sentence and (not goes_on or "\n" in match[0]):
            cuts.append(sentence)
            start = match.end()
    found = (_NUMBERING.sub("", cut.strip()).strip() for cut in (*cuts, text[start:]))
    return [sentence for sentence in found if sentence]


def fault(sentence: str, language: str) -> str | None:
    """Why a plain sentence is of no use for a language model of `language`, or None where it is of use.

    A sentence has at least three words; in scripts that do not part words by spaces, six letters.
    """
    own = scripts_of(language)
    unspaced = own is not None and not own.isdisjoint(_UNSPACED)
    if len(sentence) < MIN_LETTERS or (not unspaced and len(sentence.split()) < MIN_WORDS):
        return "too short"
    if _HOLE.search(sentence):
        return "has a hole that the program fills in"
    if _ADDRESS.search(sentence):
        return "has an address or code"
    scripts: Counter[str] = Counter()
    for character, count in Counter(sentence).items():
        scripts[script_of(character)] += count
    letters = sum(character.isalpha() for character in sentence)
    if letters < MIN_LETTERS:
        return "too short"
    if own is not None and sum(scripts[script] for script in own) <= letters / 2:
        return "mostly in another script"
    return None


def normal_form(text: str) -> str:
    """Letters and marks alone, in small letters: what two texts share that differ in case, figures or punctuation."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS)


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)) if match[1] else _ESCAPED.get(match[2], match[2])


class _Visible(dict[int, str]):
    """For `str.translate`: what cannot be seen becomes nothing; each character is looked up once."""

    def __missing__(self, code: int) -> str:
        invisible = unicodedata.category(chr(code)) in ("Cf", "Cc", "Cs") and chr(code) not in f"{_JOINERS}\n"
        return self.setdefault(code, "" if invisible else chr(code))


class _Letters(dict[int, str]):
    """For `str.translate`: what is no letter and no mark becomes nothing."""

    def __missing__(self, code: int) -> str:
        return self.setdefault(code, chr(code) if unicodedata.category(chr(code))[0] in "LM" else "")


_VISIBLE, _LETTERS = _Visible(), _Letters()
