import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from num2words import CONVERTER_CLASSES

from mole_asr.corpus.normalize import normalize

LANGUAGES = st.sampled_from(["en", "es", "fr", "it", "ru", "hi", "ca", "tr", "he", "th", "am", "hu", "qqq"])


@given(st.text(max_size=40), LANGUAGES, st.booleans())
@settings(max_examples=300, deadline=None)
@example("a\u00ad\u0301", "en", False)
@example("İI\u0307", "tr", False)
@example("ΑΣ'Σ", "en", True)
@example("x\u200c!\u200cy", "qqq", False)
def test_twice_is_once(text: str, language: str, fold_accents: bool) -> None:
    once = normalize(text, language, fold_accents)
    assert normalize(once, language, fold_accents) == once


@given(st.text(alphabet="0123456789.,:-a'", max_size=25), LANGUAGES)
@settings(max_examples=300, deadline=None)
def test_any_number_can_be_read(text: str, language: str) -> None:
    result = normalize(text, language)
    assert result == normalize(result, language)
    if language in ("en", "es", "fr", "it", "ru"):
        assert not any(c.isdecimal() for c in result)


@given(st.text(max_size=40))
def test_only_letters_marks_numbers_and_inner_signs_are_left(text: str) -> None:
    for character in normalize(text, "qqq"):
        assert unicodedata.category(character)[0] in "LMN" or character in " '\u200c\u200d"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("हिन्दी में पढ़ना", "hi"),
        ("กำลังทำงานอยู่ที่นี่", "th"),
        ("مَرْحَبًا بِكُم", "ar"),
        ("தமிழ் மொழி", "ta"),
        ("می‌خواهم", "fa"),
    ],
)
def test_marks_survive(text: str, language: str) -> None:
    assert normalize(text + "!", language) == unicodedata.normalize("NFC", text)


def test_decomposed_accents_become_composed() -> None:
    assert normalize(unicodedata.normalize("NFD", "Très élégant"), "fr") == "très élégant"


def test_folding_leaves_other_scripts_alone() -> None:
    assert normalize("¿Señor Ibáñez?", "es", fold_accents=True) == "senor ibanez"
    assert normalize("हिन्दी", "hi", fold_accents=True) == "हिन्दी"


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", "press seven"),
        ("es", "press siete"),
        ("fr", "press sept"),
        ("it", "press sette"),
        ("ru", "press семь"),
        ("qqq", "press 7"),
        ("am", "press 7"),
    ],
)
def test_digits_are_spelled(language: str, expected: str) -> None:
    assert normalize("Press 7.", language) == expected


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("0", "en", "zero"),
        ("21", "en", "twenty one"),
        ("1.6", "en", "one point six"),
        ("1.6", "it", "uno virgola sei"),
        ("2,5", "fr", "deux virgule cinq"),
        ("10,000", "en", "ten thousand"),
        ("10.000", "es", "diez mil"),
        ("1.6.1", "en", "one six one"),
        ("12:30", "en", "twelve thirty"),
        ("3a", "en", "three a"),
        ("IAX2", "en", "iax two"),
        ("28Kilobit", "it", "ventotto kilobit"),
        ("l'11", "fr", "l'onze"),
        ("007", "en", "zero zero seven"),
        ("٣", "en", "three"),
        ("1" * 12, "en", " ".join(["one"] * 12)),
        ("7", "pt-BR", "sete"),
        ("0,1234", "hu", "nulla egy kettő három négy"),  # num2words fails
        ("0,00005", "ru", "ноль ноль ноль ноль ноль пять"),
        ("0.000001", "ar", "صفر فاصلة صفر صفر صفر صفر صفر واحد"),
        ("2.05", "tr", "iki virgül sıfır beş"),  # num2words says 2.4
        ("2.0", "tr", "iki"),
        ("12.05", "bn", "বারো দশমিক শূন্য পাঁচ"),
        ("2.05", "fa", "دو ممیز صفر پنج"),
        ("0.5", "ar", "صفر فاصلة خمسة"),  # num2words says fifty
        ("0.165", "vi", "không phẩy một sáu năm"),
    ],
)
def test_numbers(text: str, language: str, expected: str) -> None:
    assert normalize(text, language) == expected


@pytest.mark.parametrize("language", sorted(set(CONVERTER_CLASSES) - {"am"}))
def test_decimals_that_differ_are_read_differently(language: str) -> None:
    code = language.replace("_", "-")
    numbers = ("0.01", "0.05", "0.1", "0.28", "0.29", "0.5", "2.05", "2.5", "0.001", "0.165", "1", "5", "50", "165")
    texts = [normalize(number, code) for number in numbers]
    assert len(set(texts)) == len(texts) and all(texts)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Don’t say “hello”!", "en", "don't say hello"),
        ("'quoted' rock 'n' roll", "en", "quoted rock n roll"),
        ("L’eau d´ici", "fr", "l'eau d'ici"),
        ("пʼять", "uk", "п'ять"),
        ("col·legi", "ca", "col·legi"),
        ("a·b", "en", "a b"),
        ("re-entered www.asterisk.org", "en", "re entered www asterisk org"),
        ("\ufeff a \t\n b_c ", "en", "a b c"),
        ("DIŞ IŞIK", "tr", "dış ışık"),
        ("... !?", "en", ""),
    ],
)
def test_signs(text: str, language: str, expected: str) -> None:
    assert normalize(text, language) == expected
