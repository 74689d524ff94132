"""Cleaning, cutting and splitting of texts, by hand and against slow references."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_asr.data_prep.texts_clean import fault, normal_form, plain, sentences
from mole_asr.data_prep.texts_split import NEAR, SHINGLE, group_keys, near_pairs, split_of


@pytest.mark.parametrize(
    ("raw", "escapes", "text"),
    [
        ("<b>Save</b> &amp; <a href='x'>close</a>", False, "Save & close"),
        ("One<br/>two\n  three  four ", False, "One\ntwo\nthree four"),
        ("Don\\u2019t&Ask\\n\\tme", True, "Don’tAsk\nme"),
        ("a\\nb", False, "a\\nb"),
        ("&Open the _file", False, "Open the file"),
        ("新建文件(&N)…", False, "新建文件…"),
        ("extended_master_secret", False, "extended_master_secret"),
        ("e\u0301te\u0301 \u200fnon\u00adsoft\ufeff", False, "été nonsoft"),
        ("می\u200cروم", False, "می\u200cروم"),
    ],
)
def test_plain(raw: str, escapes: bool, text: str) -> None:
    assert plain(raw, escapes) == text


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("Who goes there? A friend! “Pass.” And on", ["Who goes there?", "A friend!", "“Pass.”", "And on"]),
        ("Use e.g. this one.", ["Use e.g. this one."]),
        ("First\nsecond line", ["First", "second line"]),
        ("It works (Why? We do not know.) Well.", ["It works (Why? We do not know.)", "Well."]),
        ("1. One thing\n(b) another\n— a third", ["One thing", "another", "a third"]),
        ("何か。「はい。」そうだ！", ["何か。", "「はい。」", "そうだ！"]),
        ("यह है। वह है।", ["यह है।", "वह है।"]),
        ("Version 1.6.1 is here", ["Version 1.6.1 is here"]),
        ("", []),
    ],
)
def test_sentences(text: str, cut: list[str]) -> None:
    assert sentences(text) == cut


@given(st.text(alphabet='aB1 .!?。\n()”"', max_size=40))
def test_no_letter_is_lost(text: str) -> None:
    """Numbering apart: there a single letter may stand."""
    found = "".join(sentences(text.replace("1", "").replace("a", "aaaa").replace("B", "BBBB")))
    assert [c for c in found if c.isalpha()] == [
        c for c in text.replace("a", "aaaa").replace("B", "BBBB") if c.isalpha()
    ]


@pytest.mark.parametrize(
    ("sentence", "language", "reason"),
    [
        ("Three words here", "en", None),
        ("Two words", "en", "too short"),
        ("1 2 3 4 5 6", "en", "too short"),
        ("You have %S messages now", "en", "hole"),
        ("You have %1$d messages now", "en", "hole"),
        ("Hello there, $name|!", "en", "hole"),
        ("Set {name} as default", "en", "hole"),
        ("It is 100 % safe", "en", None),
        ("See https://example.org for more", "en", "address"),
        ("Write to someone@example.org about it", "en", "address"),
        ("Это русский текст", "ru", None),
        ("This is no Russian", "ru", "script"),
        ("ตัวอย่างข้อความ", "th", None),
        ("保存しました", "ja", None),
        ("保存", "ja", "too short"),
    ],
)
def test_fault(sentence: str, language: str, reason: str | None) -> None:
    found = fault(sentence, language)
    assert found is None if reason is None else found is not None and reason in found


def test_normal_form() -> None:
    assert normal_form("“Straße 12”, Ｎｏｗ!") == normal_form("STRASSE 34 now") == "strassenow"
    assert normal_form("कि") != normal_form("का")  # vowel signs are marks, and they count


def shingles(form: str) -> set[str]:
    return {form[i : i + SHINGLE] for i in range(max(1, len(form) - SHINGLE + 1))}


def test_near_pairs_are_those_of_a_comparison_of_all() -> None:
    rng = random.Random(0)
    forms = ["".join(rng.choices("abcd", k=rng.randint(1, 60))) for _ in range(60)]
    for form in forms[:40]:  # near ones, by a change or two
        letters = list(form * 2)
        for _ in range(rng.randint(0, 2)):
            letters[rng.randrange(len(letters))] = rng.choice("abcd")
        forms.append("".join(letters))
        forms.append(form * 2)
    forms = sorted(set(forms))
    wanted = set()
    for a, b in itertools.combinations(range(len(forms)), 2):
        first, second = shingles(forms[a]), shingles(forms[b])
        if len(first & second) >= NEAR * len(first | second):
            wanted.add((a, b))
    assert len(wanted) > 20
    found = [tuple(sorted(pair)) for pair in near_pairs(forms)]
    assert set(found) == wanted
    assert len(found) == len(wanted)


def test_groups_are_chains() -> None:
    near = "thequickbrownfoxjumpsoverthelazydog"
    keys = group_keys({"d": ["abc"], "b": [near], "c": [near + "s", "abc"], "a": ["somethingelse"], "e": []})
    assert keys == {"a": "a", "b": "b", "c": "b", "d": "b", "e": "e"}


def test_shares_of_the_splits() -> None:
    counts = {split: 0 for split in ("train", "dev", "test")}
    for number in range(20_000):
        counts[split_of(f"key {number}")] += 1
    assert counts["test"] == pytest.approx(1000, abs=100)  # three standard deviations
    assert counts["dev"] == pytest.approx(1000, abs=100)
