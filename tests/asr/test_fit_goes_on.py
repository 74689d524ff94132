"""The `fit` verb from a trained model: a pretrained one, one with room for a new language."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mole_asr.asr import task
from mole_asr.asr.checkpoint import load_model
from mole_asr.asr.extend import extend
from mole_asr.asr.fine_tuning import CTC_EPOCHS, is_new
from mole_asr.asr.fit import fit
from mole_asr.asr.pretrained import PretrainedModel, from_checkpoint
from mole_asr.asr.replay import load_examples
from mole_asr.corpus.manifest import Manifest, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer, extend_tokenizer
from mole_asr.decode.ngram import load_ngrams
from mole_asr.errors import MoleError

from .conftest import weights


def test_the_written_model_is_brought_back_towards_the_pretrained_one(
    on_whisper: Callable[..., list[str]], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    changes = {"trainer__max_steps": 12, "model__fine_tuning__lr": 0.01, "average_decay": 0.5}
    fit(on_whisper(**changes))
    learned = weights(tmp_path / "run")
    fit(on_whisper(**changes, model__fine_tuning__pretrained_share=0.25))  # the run is complete
    blended, model = weights(tmp_path / "run"), load_model(tmp_path / "run" / "model")[0]
    assert isinstance(model, PretrainedModel)
    start = from_checkpoint(model.config, model.languages, model.ctc.linear.out_features).state_dict()
    moved = set()
    for name, value in learned.items():
        if name.startswith("ctc."):  # it is fitted anew
            assert not torch.equal(blended[name], value)
        elif is_new(name):
            assert torch.equal(blended[name], value)
        else:
            torch.testing.assert_close(blended[name], value.lerp(start[name], 0.25))
            moved |= {name} if not torch.allclose(value, start[name], atol=1e-4) else set()
    assert any(name.startswith("attention_head") for name in moved)
    assert any("experts" in name for name in moved)
    with pytest.raises(MoleError, match=r"pretrained_share: is for a start from model\.pretrained"):
        fit(command(model__fine_tuning__pretrained_share=0.5))


def test_the_ctc_head_is_fitted_to_all_training_data(
    on_whisper: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[list[list[tuple[str, ...]]]]()

    def fit_ctc_head(model: PretrainedModel, epochs: list[Any], lr: float, precision: Any) -> None:
        assert lr == 0.01, "that of new parts"
        calls.append([[tuple(batch.ids) for batch in epoch] for epoch in epochs])
        with precision():
            assert torch.is_autocast_enabled("cpu")

    monkeypatch.setattr(task, "fit_ctc_head", fit_ctc_head)
    changes = {"trainer__max_steps": 2, "trainer__precision": "bf16-mixed"}
    words = [*on_whisper(**changes), "--model.fine_tuning.pretrained_share=0.25"]
    fit(words)
    fit(words)  # the run is complete
    fit([*words, "--model.loss_weights.ctc=0"])
    first, again = calls
    assert first == again and len(first) == CTC_EPOCHS
    assert first[0] != first[1], "another order"
    trained = {name for batch in first[0] for name in batch}
    assert len(trained) > 2 and all({name for batch in epoch for name in batch} == trained for epoch in first)


def test_a_trained_model_grows_to_a_new_language(
    command: Callable[..., list[str]],
    tones: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    write_texts: Callable[[Path, list[str]], Path],
) -> None:
    fit(command(output=tmp_path / "old", trainer__max_epochs=1))
    old = weights(tmp_path / "old")
    texts = write_texts(tmp_path / "texts.jsonl", ["xy yx abxy"])
    extend_tokenizer(tokenizer_folder, texts, tmp_path / "wider", extra_pieces=2)
    words = command(
        output=tmp_path / "new",
        data__tokenizer=tmp_path / "wider",
        data__languages="[de, en, xx]",
        model__init_from=tmp_path / "old" / "model",
        average_decay=0.0,
        model__optimizer__lr=0.0,
        model__optimizer__adamw_lr=0.0,
        trainer__max_epochs=1,
    )
    fit(words)
    model, tokenizer = load_model(tmp_path / "new" / "model")
    assert model.languages == ["de", "en", "xx"]
    assert tokenizer.vocab_size == model.vocab_size == len(old["ctc.bias"]) + 2
    # Nothing was learnt (rates of zero): the old rows must be those of the old model.
    assert torch.equal(model.state_dict()["ctc.weight"][:-2], old["ctc.weight"])


def test_a_new_language_is_trained_alone(
    command: Callable[..., list[str]], tones: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Recordings of the new language and one of an old one; an interrupted run, averages and clipping included."""
    fit(command(output=tmp_path / "old"))
    manifest = Manifest(tones / "train.jsonl")
    dutch = [replace(manifest[row], language="nl", text=manifest[row].text.replace("a", "x")) for row in range(8)]
    write_manifest([*dutch, manifest[8]], tmp_path / "dutch.jsonl")
    extend_tokenizer(tokenizer_folder, tmp_path / "dutch.jsonl", tmp_path / "wider", extra_pieces=1)
    extend(
        str(tmp_path / "old" / "model"),
        str(tmp_path / "room"),
        languages=["nl"],
        tokenizer=str(tmp_path / "wider"),
    )
    words = [word for word in command() if not word.startswith("--model.encoder")]
    changes = {
        "output": tmp_path / "new",
        "data.train_manifest": tmp_path / "dutch.jsonl",
        "data.valid_manifest": tmp_path / "dutch.jsonl",
        "data.tokenizer": tmp_path / "wider",
        "data.languages": "[de, en, nl]",
        "model.init_from": tmp_path / "room",
        "model.freeze_old": "true",
        "trainer.gradient_clip_val": 1.0,
    }
    words += [f"--{key}={value}" for key, value in changes.items()]
    fit([*words, "--trainer.max_epochs=1"])
    fit(words)  # goes on
    before, after = weights(tmp_path / "old"), weights(tmp_path / "new")
    assert set(before) == set(after)
    for name, old in before.items():
        new = after[name]
        grown = [dim for dim, size in enumerate(old.shape) if new.shape[dim] != size]
        for dim in grown:
            added = new.narrow(dim, old.shape[dim], new.shape[dim] - old.shape[dim])
            assert (added != -1e4).all(), "awake"
            new = new.narrow(dim, 0, old.shape[dim])
        assert torch.equal(new, old), name
    examples, known = (
        load_examples(tmp_path / name / "model", load_model(tmp_path / name / "model")[0]) for name in ("new", "old")
    )
    assert set(known) == {"de", "en"} and set(examples) == {"de", "en", "nl"}
    assert all(torch.equal(examples[code], known[code]) for code in known), "for the next language"
    unreplayed = [f"--output={tmp_path / 'unreplayed'}" if "--output" in word else word for word in words]
    fit([*unreplayed, "--model.loss_weights.replay=0"])
    row = "mixture.language_tokenizer.languages.weight"
    assert not torch.equal(weights(tmp_path / "unreplayed")[row][2], after[row][2]), "what is replayed is learnt from"
    V = TextTokenizer(tokenizer_folder).vocab_size
    old_ngrams = load_ngrams(tmp_path / "old" / "model", V)
    ngrams = load_ngrams(tmp_path / "new" / "model", V + 1)
    assert set(ngrams) == {"de", "en", "nl"}
    for code in ("de", "en"):
        assert np.array_equal(ngrams[code].log_probs([1])[[*range(V), V + 1]], old_ngrams[code].log_probs([1]))
    with pytest.raises(MoleError, match="nothing old"):
        fit([*command(output=tmp_path / "third"), "--model.freeze_old=true"])
