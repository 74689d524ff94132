import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole_asr.corpus.normalize import normalize
from mole_asr.decode.words import WordList, load_words
from mole_asr.errors import MoleError


def test_usual_words_are_likelier_and_no_words_are_not_likely_at_all() -> None:
    words = WordList("fr", {"un": 6.0, "escargot": 3.0, "l'eau": 1.0})
    assert words.log_prob("Un escargot!") == pytest.approx(math.log(0.6) + math.log(0.3))
    assert words.log_prob("l’eau") == pytest.approx(math.log(0.1))
    assert words.log_prob("") == 0
    unknown = words.log_prob("escarbo")
    assert unknown < -3 and words.log_prob("escarbots") < unknown, "longer ones are less likely"


def test_an_unknown_word_is_as_likely_as_its_spelling() -> None:
    """A name, a plural or a derived word is spelled as others are; another language is not."""
    words = WordList("fr", dict.fromkeys(("chanter", "chanteur", "danser", "danseur", "marcher", "noir", "noirs"), 1.0))
    assert words.log_prob("marcheur") > words.log_prob("hcarmeur") > words.log_prob("шапка")
    assert words.log_prob("danseurs") > words.log_prob("chantant"), "two letters that end no word in this list"
    goes_on = [words.log_prob(f"mux{letter}", whole=False) for letter in [*sorted(set("chanterdsumoi")), "ж"]]
    total = math.exp(words.log_prob("mux")) + sum(map(math.exp, goes_on))
    assert math.log(total) == pytest.approx(words.log_prob("mux", whole=False)), "it ends, or some letter follows"


@given(st.text("chanterdsuomiqж'", min_size=1, max_size=12), st.sampled_from("chanter ж"))
def test_more_letters_are_never_likelier(text: str, letter: str) -> None:
    words = WordList("fr", {"chanter": 3.0, "chanteur": 1.0, "danser": 1.0, "d": 2.0})
    begun = words.log_prob(text, whole=False)
    assert words.log_prob(text) <= begun + 1e-9
    assert words.log_prob(text + letter, whole=False) <= begun + 1e-9


def test_a_mark_alone_is_no_word() -> None:
    """The Spanish list of wordfreq has some; they made each text of one word less likely."""
    words = WordList("es", {"si": 1.0, "\u0361": 1.0})
    assert words.log_prob("") == 0 and words.log_prob("si") == pytest.approx(math.log(0.5))


def test_a_word_that_is_being_written_counts_as_the_likeliest_that_begins_so() -> None:
    words = WordList("fr", {"un": 6.0, "escargot": 3.0, "escale": 1.0})
    assert words.log_prob("un esca", whole=False) == words.log_prob("un escargot")
    assert words.log_prob("un escal", whole=False) == words.log_prob("un escale")
    assert words.log_prob("un escarb") < words.log_prob("un escarb", whole=False) < words.log_prob("un esca", False)
    assert words.log_prob("es", whole=False) > words.log_prob("es") and words.log_prob("", whole=False) == 0


def test_words_count_without_their_accents_too() -> None:
    """The Spanish prompts are written without them."""
    words = WordList("es", {"avión": 3.0, "sí": 2.0, "si": 5.0})
    assert words.log_prob("avión") == pytest.approx(math.log(0.3))
    assert words.log_prob("avion") == pytest.approx(math.log(0.03)), "but less"
    assert words.log_prob("si") == pytest.approx(math.log(0.5))
    assert words.log_prob("sí") == pytest.approx(math.log(0.2))


def test_what_is_joined_by_an_apostrophe_counts_as_its_parts() -> None:
    words = WordList("fr", {"l": 2.0, "eau": 1.0, "aujourd'hui": 1.0})
    assert words.log_prob("l'eau") == words.log_prob("l eau") == pytest.approx(math.log(0.5) + math.log(0.25))
    assert words.log_prob("l’ea", whole=False) == words.log_prob("l'eau")
    assert words.log_prob("aujourd'hui") == pytest.approx(math.log(0.25))
    assert words.log_prob("d'eau") < words.log_prob("l'ea") < words.log_prob("l'eau")
    assert words.log_prob("d'eau") == pytest.approx(words.log_prob("d eau"))


def test_counts_may_be_of_any_size() -> None:
    words = WordList("en", {"seldom": 1e-320, "often": 1e10, "séldom": 1e-323})
    assert -800 < words.log_prob("seldom") < words.log_prob("often") == 0


def test_a_text_counts_word_by_word() -> None:
    words = WordList("fr", {"un": 6.0, "escargot": 3.0, "l": 1.0})
    for text in ("un escargot", "un escarbo l'escargot un", "un  escargot", "un 1 un"):
        each = sum(words.log_prob(word) for word in normalize(text, "fr").split())
        assert words.log_prob(text) == words.log_prob(text) == pytest.approx(each)


def test_lists_are_read_by_language(tmp_path: Path) -> None:
    (tmp_path / "fr.tsv").write_text("escargot\t0.5\nNew York\t0.5\nescargot\t1e0\n", "utf-8")
    (tmp_path / "pt.tsv").write_text("Pão\t3\n", "utf-8")
    (tmp_path / "de.tsv").write_text("this is no list", "utf-8")
    lists = load_words(tmp_path, ["fr", "pt-BR", "be"])
    assert lists.keys() == {"fr", "pt-BR"}
    assert lists["fr"].log_prob("escargot") == pytest.approx(math.log(0.6))
    assert lists["fr"].log_prob("new york") == pytest.approx(2 * math.log(0.2))
    assert lists["pt-BR"].log_prob("pão") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"un\t1\nescargot\n", r"fr\.tsv, line 2: 'escargot' is not a word, a tab"),
        (b"un\t0\n", r"fr\.tsv, line 1: 'un\\t0' is not"),
        (b"un\tnan\n", r"fr\.tsv, line 1"),
        (b"\t1\n", r"fr\.tsv, line 1"),
        (b"!\t1\n", r"fr\.tsv, line 1: '!\\t1' is not"),
        (b"", r"fr\.tsv: is empty"),
        (b"\xff\xfe", r"fr\.tsv: cannot be read as UTF-8"),
        (None, r"no word list \(xx\.tsv\) of fr, it; `mole-asr prepare words`"),
    ],
)
def test_what_is_no_list(tmp_path: Path, text: bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / "fr.tsv").write_bytes(text)
    with pytest.raises(MoleError, match=message):
        load_words(tmp_path, ["fr", "it"])
