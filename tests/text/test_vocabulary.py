"""Both vocabularies give back what they were given."""

from pathlib import Path

import pytest

from mole_asr.errors import MoleError
from mole_asr.text.vocabulary import load_saved_vocabulary, load_vocabulary

TEXTS = ["ab cd", "Ünïcode ✓", "日本語", "a  b"]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_texts_come_back_and_specials_are_no_texts(kind: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    vocabulary = load_vocabulary("bytes" if kind == "bytes" else tokenizer_folder)
    for text in TEXTS:
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        assert ids.min() >= 0 and ids.max() < vocabulary.size
        assert not {vocabulary.separator, vocabulary.mask} & set(ids.tolist())
    first, second = (vocabulary.encode(text).tolist() for text in TEXTS[:2])
    assert vocabulary.decode([*first, vocabulary.separator, vocabulary.mask, *second]) == f"{TEXTS[0]}\n{TEXTS[1]}"
    vocabulary.save(tmp_path)
    again = load_saved_vocabulary(tmp_path)
    assert (again.size, again.fingerprint) == (vocabulary.size, vocabulary.fingerprint)


def test_bytes_take_the_place_of_pieces(tokenizer_folder: Path, tmp_path: Path) -> None:
    for name in (tokenizer_folder, "bytes"):
        load_vocabulary(name).save(tmp_path)
    assert load_saved_vocabulary(tmp_path).fingerprint == load_vocabulary("bytes").fingerprint


def test_bytes_that_are_no_text_do_not_end_the_generation() -> None:
    assert load_vocabulary("bytes").decode([0xE2, ord("a")]) == "�a"


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="nowhere"):
        load_vocabulary(tmp_path / "nowhere")
