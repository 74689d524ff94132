import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer, _sentences, extend_tokenizer, train_tokenizer
from mole_asr.errors import MoleError

ENGLISH = ["please enter your number", "the number you have dialed", "press one for more options", "goodbye for now"]
FRENCH = ["veuillez entrer votre numéro", "appuyez sur la touche dièse", "merci et à bientôt"]
GREEK = ["παρακαλώ περιμένετε στη γραμμή", "ευχαριστώ πολύ για την κλήση", "πατήστε το ένα για βοήθεια"]


def manifest(path: Path, texts: dict[str, list[str]]) -> Path:
    write_manifest(
        (
            Utterance(f"{language}{i}", Path("/a.wav"), 0.0, 1.0, 16000, text, language, num_samples=16000)
            for language, lines in texts.items()
            for i, text in enumerate(lines)
        ),
        path,
    )
    return path


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("latin") / "cuts.jsonl", {"en": ENGLISH * 4, "fr": FRENCH})


@pytest.fixture(scope="module")
def greek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("greek") / "cuts.jsonl", {"el": GREEK})


@pytest.fixture(scope="module", params=["unigram", "bpe", "char"])
def tokenizer(request: pytest.FixtureRequest, latin: Path, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_tokenizer(latin, tmp_path_factory.mktemp("tokenizer"), 305, model_type=request.param)


def test_ids_of_blank_and_unknown(tokenizer: TextTokenizer) -> None:
    assert tokenizer.piece(0) == "<blank>"
    assert tokenizer.piece(1) == "<unk>"
    assert not {0, 1} & set(tokenizer.encode("please <blank> <unk> </s>"))
    assert tokenizer.decode([0, *tokenizer.encode("merci"), 0]) == "merci"


@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=30))
@settings(max_examples=150, deadline=None)
def test_byte_fallback_round_trip(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 1 not in tokenizer.encode(text)


def test_training_is_repeatable(latin: Path, tmp_path: Path) -> None:
    first = train_tokenizer(latin, tmp_path / "a", 305)
    assert train_tokenizer(latin, tmp_path / "b", 305) == first
    assert train_tokenizer(latin, tmp_path / "c", 300) != first
    assert first.vocab_size == 305


def test_save_load_pickle(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path / "model")
    for copy in (TextTokenizer(path), TextTokenizer(tmp_path / "model"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy == tokenizer
        assert copy.encode("please enter") == tokenizer.encode("please enter")


def test_without_byte_fallback_strange_characters_are_unknown(latin: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(latin, tmp_path, 50, byte_fallback=False)
    assert 1 in tokenizer.encode("ж")
    assert tokenizer.decode(tokenizer.encode("numéro")) == "numéro"


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_large_vocabulary_names_the_largest(latin: Path, tmp_path: Path, model_type: str) -> None:
    with pytest.raises(MoleError, match=r"at most \d+$") as caught:
        train_tokenizer(latin, tmp_path, 5000, model_type=model_type)
    largest = int(str(caught.value).split()[-1])
    assert train_tokenizer(latin, tmp_path, largest, model_type=model_type).vocab_size == largest


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char"])
def test_too_small_vocabulary_names_the_smallest(latin: Path, tmp_path: Path, model_type: str) -> None:
    with pytest.raises(MoleError, match=r"at least (\d+)") as caught:
        train_tokenizer(latin, tmp_path, 100, model_type=model_type)
    smallest = int(str(caught.value).split("at least ")[1].split()[0])
    assert train_tokenizer(latin, tmp_path, smallest, model_type=model_type).vocab_size == smallest


def test_texts_are_needed(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="no utterance has a text"):
        train_tokenizer(manifest(tmp_path / "cuts.jsonl", {"en": [""]}), tmp_path)


@pytest.mark.parametrize(("balance", "french_share"), [(1.0, 1 / 5), (0.5, 1 / 3), (0.0, 1 / 2)])
def test_languages_are_balanced(tmp_path: Path, balance: float, french_share: float) -> None:
    path = manifest(tmp_path / "cuts.jsonl", {"en": [f"e{i}" for i in range(80)], "fr": [f"f{i}" for i in range(20)]})
    counts = Counter(_sentences(path, balance, seed=0))
    assert len(counts) == 100  # nothing is lost
    french = sum(count for text, count in counts.items() if text.startswith("f"))
    assert french / counts.total() == pytest.approx(french_share, abs=0.01)


def test_extension_keeps_old_ids(tokenizer: TextTokenizer, greek: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "old")
    extended = extend_tokenizer(tmp_path / "old", greek, tmp_path / "new", extra_pieces=20)
    assert extended.vocab_size == tokenizer.vocab_size + 20
    assert [extended.piece(i) for i in range(tokenizer.vocab_size)] == [
        tokenizer.piece(i) for i in range(tokenizer.vocab_size)
    ]
    assert TextTokenizer(tmp_path / "new") == extended
    assert TextTokenizer(tmp_path / "old") == tokenizer
    for text in GREEK:
        assert extended.decode(extended.encode(text)) == text
        assert len(extended.encode(text)) < len(tokenizer.encode(text))
    for text in ENGLISH + FRENCH:  # Greek pieces fit nowhere in them
        assert extended.encode(text) == tokenizer.encode(text)
        assert extended.decode(tokenizer.encode(text)) == text


@given(text=st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=30))
@settings(max_examples=50, deadline=None)
def test_extended_tokenizer_round_trip(extended_unigram: TextTokenizer, text: str) -> None:
    assert extended_unigram.decode(extended_unigram.encode(text)) == text


@pytest.fixture(scope="module")
def extended_unigram(latin: Path, greek: Path, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("extended")
    train_tokenizer(latin, folder, 305)
    return extend_tokenizer(folder, greek, folder / "new", extra_pieces=25)


def test_extension_limits_are_named(latin: Path, greek: Path, tmp_path: Path) -> None:
    train_tokenizer(latin, tmp_path, 40, byte_fallback=False)
    new_characters = len(set("".join(GREEK)) - {" "})
    with pytest.raises(MoleError, match=f"too small, .* has {new_characters} new characters"):
        extend_tokenizer(tmp_path, greek, tmp_path / "new", extra_pieces=5)
    with pytest.raises(MoleError, match="--extra-pieces -1: must be at least 0"):
        extend_tokenizer(tmp_path, greek, tmp_path / "new", extra_pieces=-1)
    with pytest.raises(MoleError, match="has the old tokenizer"):
        extend_tokenizer(tmp_path / "tokenizer.model", greek, tmp_path, extra_pieces=50)
    with pytest.raises(MoleError, match="--seed -1: must be"):
        train_tokenizer(latin, tmp_path, 40, byte_fallback=False, seed=-1)
    with pytest.raises(MoleError, match="--balance 1e"):
        train_tokenizer(latin, tmp_path, 40, balance=1e6)


def test_fewer_new_pieces_than_asked_for_are_no_error(latin: Path, greek: Path, tmp_path: Path) -> None:
    old = train_tokenizer(latin, tmp_path, 50, byte_fallback=False, model_type="char")
    new_characters = len(set("".join(GREEK)) - {" "})
    extended = extend_tokenizer(tmp_path, greek, tmp_path / "new", extra_pieces=5000)
    assert extended.vocab_size == old.vocab_size + new_characters
    assert extend_tokenizer(tmp_path, latin, tmp_path / "same").vocab_size == old.vocab_size


def test_missing_or_foreign_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="cannot be read"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
    with pytest.raises(MoleError, match="not a sentencepiece model"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(MoleError, match="mole-asr tokenizer train"):
        TextTokenizer(tmp_path)


def test_texts_without_speech_train_the_same_tokenizer(tmp_path: Path) -> None:
    texts = {"en": ENGLISH, "fr": FRENCH}
    lines = [json.dumps({"text": text, "language": code}) for code, each in texts.items() for text in each]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    found = train_tokenizer(tmp_path / "texts.jsonl", tmp_path / "a", vocab_size=300)
    assert found == train_tokenizer(manifest(tmp_path / "cuts.jsonl", texts), tmp_path / "b", vocab_size=300)
