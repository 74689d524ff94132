import pytest

from mole_asr.score.pairs import Pair
from mole_asr.score.scripts import script_of, wrong_script_share


@pytest.mark.parametrize(
    ("character", "script"),
    [("a", "LATIN"), ("é", "LATIN"), ("Я", "CYRILLIC"), ("ў", "CYRILLIC"), ("ς", "GREEK"), ("7", ""), ("'", ""),
     ("\u0301", ""), ("ー", ""), ("々", ""), ("ʻ", ""), ("ª", ""),
     ("中", "CJK"), ("한", "HANGUL"), ("Ａ", "LATIN"), ("ş", "LATIN"), ("ب", "ARABIC")],
)  # fmt: skip
def test_script_of(character: str, script: str) -> None:
    assert script_of(character) == script


def pair(language: str, hypothesis: str) -> Pair:
    return Pair("id", "reference", hypothesis, language)


def test_share_is_of_letters_over_all_utterances() -> None:
    # Two Latin letters in Russian, one Cyrillic in Spanish; figures, spaces and marks are no letters.
    pairs = [pair("ru", "да yo 12"), pair("es", "señor я"), pair("el", "ναι"), pair("ca", "")]
    assert wrong_script_share(pairs) == pytest.approx(3 / (4 + 6 + 3))
    assert wrong_script_share([pair("es", "12")]) is None
    assert wrong_script_share([pair("ckb", "سڵاو")]) == 0
    assert wrong_script_share([pair("xx", "да"), pair("und", "да")]) is None  # whose script we do not know
    assert wrong_script_share([pair("sr-Latn", "da да")]) == 0
