import pytest

from mole_asr.corpus.languages import _KNOWN
from mole_asr.score.pairs import Pair
from mole_asr.score.scripts import script_of, scripts_of, wrong_script_share


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


def test_which_languages_are_taken_for_latin() -> None:
    """A code that comes to the list of known ones is Latin unless it is said not to be: look at it, then name it."""
    latin = " ".join(sorted(code for code in _KNOWN if scripts_of(code) == {"LATIN"}))
    assert latin == (
        "af ak az bm br bs ca cs cy da de ee en eo es et eu ff fi fo fr fy ga gd gl gn ha hr ht hu id ig is "
        "it jv kg ki lb lg ln lt lv mg mi ms mt nb nl nn no nv ny oc pl pt qu rm ro rw sk sl sn so sq ss st "
        "su sv sw tk tl tn tr ts tw ve vi wo xh yo zu"
    )


def test_share_is_of_letters_over_all_utterances() -> None:
    # Two Latin letters in Russian, one Cyrillic in Spanish; figures, spaces and marks are no letters.
    pairs = [pair("ru", "да yo 12"), pair("es", "señor я"), pair("el", "ναι"), pair("ca", "")]
    assert wrong_script_share(pairs) == pytest.approx(3 / (4 + 6 + 3))
    assert wrong_script_share([pair("es", "12")]) is None
    assert wrong_script_share([pair("ckb", "سڵاو")]) == 0
    assert wrong_script_share([pair("xx", "да"), pair("und", "да")]) is None  # whose script we do not know
    assert wrong_script_share([pair("sr-Latn", "da да")]) == 0
