import builtins
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mole_asr.asr.whisper_tokenizer import WhisperTokenizer
from mole_asr.errors import MoleError


@pytest.fixture
def tokenizer(whisper_tokenizer_json: str) -> WhisperTokenizer:
    return WhisperTokenizer.from_text(whisper_tokenizer_json)


@pytest.mark.parametrize("text", ["ab cd", "été, naïf?", "просто", "日本", "dcdcab"])
def test_texts_come_back_and_equal_transformers(tokenizer: WhisperTokenizer, whisper_folder: Path, text: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(whisper_folder / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(" " + text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_a_text_starts_with_a_space_and_an_empty_one_has_no_tokens(tokenizer: WhisperTokenizer) -> None:
    assert len(tokenizer.encode("ab")) == 1  # "Ġab" is one token
    assert tokenizer.encode(" ab ") == tokenizer.encode("ab")
    assert tokenizer.encode(" ") == []


def test_a_prompt_names_the_language_where_it_is_known(tokenizer: WhisperTokenizer) -> None:
    assert (tokenizer.end_id, tokenizer.language_ids) == (262, {"en": 264, "de": 265, "fr": 266, "haw": 267})
    assert tokenizer.prompt("de") == [263, 265, 269, 271]
    assert tokenizer.prompt(None) == tokenizer.prompt("xx") == tokenizer.prompt("") == [263, 269, 271]
    assert tokenizer.prompt("de-AT") == tokenizer.prompt("de")


def test_whispers_own_codes(whisper_tokenizer_json: str) -> None:
    text = whisper_tokenizer_json.replace("<|haw|>", "<|jw|>").replace("<|fr|>", "<|no|>")
    tokenizer = WhisperTokenizer.from_text(text)
    assert [tokenizer.prompt(code)[1] for code in ("jv", "nb", "no")] == [267, 266, 266]


def test_special_tokens_and_times_are_not_text(tokenizer: WhisperTokenizer) -> None:
    # 299 is a time: an id of the model that the tokenizer's file does not have.
    assert tokenizer.decode([*tokenizer.prompt("en"), *tokenizer.encode("ab cd"), 299, tokenizer.end_id]) == "ab cd"


def test_special_tokens_in_a_text_are_only_letters(tokenizer: WhisperTokenizer) -> None:
    text = "ab <|endoftext|> cd"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.end_id
    assert tokenizer.decode(ids) == text


def test_a_tokenizer_is_saved_and_pickled(tokenizer: WhisperTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new")
    for other in (WhisperTokenizer(tmp_path / "new"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode("ab été") == tokenizer.encode("ab été")
        assert other.prompt("fr") == tokenizer.prompt("fr")


def test_bad_files_are_refused(whisper_tokenizer_json: str, tmp_path: Path) -> None:
    with pytest.raises(MoleError, match=r"tokenizer\.json: .* cannot be read"):
        WhisperTokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text('{"no": "tokenizer"}')
    with pytest.raises(MoleError, match=r"not a tokenizer\.json"):
        WhisperTokenizer(path)
    english = json.loads(whisper_tokenizer_json)
    english["added_tokens"] = [token for token in english["added_tokens"] if token["id"] not in (265, 266, 267)]
    path.write_text(json.dumps(english))
    with pytest.raises(MoleError, match="multilingual"):
        WhisperTokenizer(path)


def test_a_missing_package_is_named(whisper_tokenizer_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MoleError, match=r"pip install 'mole-asr\[whisper\]'"):
        WhisperTokenizer.from_text(whisper_tokenizer_json)
