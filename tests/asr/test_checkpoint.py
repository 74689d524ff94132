import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.model import MoleModel
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer, train_tokenizer
from mole_asr.errors import MoleError

FILES = {"model.safetensors", "config.json", "languages.json", "tokenizer.model"}


@pytest.fixture
def folder(make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, tmp_path: Path) -> Path:
    save_model(make_model(), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(MoleError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_round_trip_is_bitwise(
    make_model: Callable[..., MoleModel], tokenizer: TextTokenizer, batch: Batch, tmp_path: Path
) -> None:
    changes = {"routing_unit": "frame", "reliability": "sigmoid", "intermediate_ctc_blocks": (1, 2), "temperature": 2.0}
    model = make_model(**changes).eval()
    save_model(model, tokenizer, tmp_path)
    loaded, loaded_tokenizer = load_model(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    assert (loaded.languages, loaded.vocab_size) == (model.languages, model.vocab_size)
    assert loaded_tokenizer == tokenizer
    states = model.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    before, after = (m(batch.audio_BS, batch.audio_lengths_B) for m in (model, loaded))
    assert torch.equal(before.log_probs_BTV, after.log_probs_BTV)
    assert torch.equal(before.reliability_B, after.reliability_B)


def test_nothing_is_pickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    header = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert set(json.loads(header[8 : 8 + size])) - {"__metadata__"} == set(load_model(folder)[0].state_dict())
    for name in ("config.json", "languages.json"):
        json.loads((folder / name).read_text(encoding="utf-8"))
    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("something was unpickled"))
    load_model(folder)


def test_saving_over_an_older_model(
    folder: Path, make_model: Callable[..., MoleModel], tokenizer: TextTokenizer
) -> None:
    save_model(make_model(["xx"], d_model=8), tokenizer, folder)
    loaded, _ = load_model(folder)
    assert (loaded.languages, loaded.config.d_model) == (["xx"], 8)
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refused(folder)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("content", [b"", b"{\xff not what it should be"], ids=["empty", "garbage"])
def test_a_broken_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert name in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "languages.json"])
def test_another_kind_of_json_is_named(folder: Path, name: str) -> None:
    for content in ("null", "5", "[]" if name == "config.json" else "{}"):
        (folder / name).write_text(content)
        assert f"{name}: holds no " in refused(folder)


def test_weights_cut_short_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refused(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert "mole-asr fit" in refused(tmp_path / "nowhere")


def test_files_that_do_not_fit_each_other(
    folder: Path, tmp_path: Path, write_texts: Callable[[Path, list[str]], Path]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    texts = write_texts(other / "texts.jsonl", ["xyz uvw opq rst"])
    tokenizer = train_tokenizer(texts, other, vocab_size=50, byte_fallback=False, model_type="char")
    right = folder / "tokenizer.model"
    kept = shutil.copy(right, tmp_path / "kept.model")
    tokenizer.save(folder)
    assert f"{tokenizer.vocab_size} pieces" in refused(folder)
    shutil.copy(kept, right)

    (folder / "languages.json").write_text('["de", "en"]')
    assert "does not fit" in refused(folder)
    (folder / "languages.json").write_text('["de", "en", "fr"]')

    config = json.loads((folder / "config.json").read_text())
    for changed, word in [
        ({**config, "format": 99}, "format"),
        ({**config, "encoder": {**config["encoder"], "d_ff": 99}}, "does not fit"),
        ({**config, "encoder": {**config["encoder"], "wonder": 1}}, "unknown key wonder"),
        ({**config, "encoder": {**config["encoder"], "kernel_size": 4}}, "kernel_size"),
        ({"format": config["format"], "encoder": config["encoder"]}, "vocab_size"),
        ({"format": config["format"], "vocab_size": config["vocab_size"]}, "encoder"),
        ({"format": config["format"], "vocab_size": config["vocab_size"], "pretrained": {}}, "whisper"),
        ([1, 2], "config.json"),
        ({**config, "vocab_size": "many"}, "many"),
        ({**config, "encoder": {**config["encoder"], "d_model": "wide"}}, "config.json"),
    ]:
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(MoleError, match=word) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
    (folder / "config.json").write_text(json.dumps(config))
    load_model(folder)
