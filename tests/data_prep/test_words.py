from pathlib import Path

import pytest

from mole_asr.corpus.normalize import normalize
from mole_asr.data_prep.words import prepare
from mole_asr.decode.words import load_words
from mole_asr.errors import MoleError


def test_the_usual_words_of_a_language(tmp_path: Path) -> None:
    pytest.importorskip("wordfreq", reason="wordfreq is not installed")
    said = prepare(tmp_path, languages=["es", "el"])
    words = {}
    for code in ("es", "el"):
        lines = (tmp_path / f"{code}.tsv").read_text("utf-8").splitlines()
        words[code] = dict(line.split("\t") for line in lines)
        assert len(words[code]) == len(lines) > 15_000
        assert all(any(map(str.isalpha, normalize(word, code))) for word in words[code])
        assert not any(character.isdecimal() for word in words[code] for character in word)
        frequencies = [float(each) for each in words[code].values()]
        assert frequencies == sorted(frequencies, reverse=True)
        assert f"{code} {len(lines)}" in said
    assert next(iter(words["es"])) == "de" and "avión" in words["es"]
    lists = load_words(tmp_path, ["es"])
    assert lists["es"].log_prob("un avion") > lists["es"].log_prob("un avoin") + 9


def test_a_language_without_a_list(tmp_path: Path) -> None:
    pytest.importorskip("wordfreq", reason="wordfreq is not installed")
    with pytest.raises(MoleError, match=r"^languages: wordfreq has no list of be, xx; it has ar, bg, "):
        prepare(tmp_path / "words", languages=["ru", "be", "xx"])
    with pytest.raises(MoleError, match=r"^languages: zh is written without spaces"):
        prepare(tmp_path / "words", languages=["ru", "zh"])
    assert not (tmp_path / "words").exists()
