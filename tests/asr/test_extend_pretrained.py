"""`extend`, `prune` and training of the new alone, on a model that stands on a pretrained (tiny, random) Whisper."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mole_asr.asr.checkpoint import load_model, save_model
from mole_asr.asr.extend import extend
from mole_asr.asr.familiarity import remember
from mole_asr.asr.fine_tuning import FineTuning, fine_tuning_optimizer
from mole_asr.asr.generations import contemporaries, guard, mixture_of, train_last_generation, wake
from mole_asr.asr.losses import losses
from mole_asr.asr.pretrained import PretrainedConfig, PretrainedModel, from_checkpoint
from mole_asr.asr.prune import prune
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer, extend_tokenizer
from mole_asr.transcribe import transcriber

from .conftest import LANGUAGES


@pytest.fixture
def folder(whisper_folder: Path, tokenizer: TextTokenizer, batch: Batch, tmp_path: Path) -> Path:
    """A saved model whose CTC head has heard something, and to which some of the utterances are strange."""
    torch.manual_seed(0)
    config = PretrainedConfig(checkpoint=str(whisper_folder), num_mole_blocks=1, language_tokenizer_block=1)
    model = from_checkpoint(config, LANGUAGES, tokenizer.vocab_size)
    model.train()(batch.audio_BS, batch.audio_lengths_B)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "moe"):  # experts that differ, as after training
                layer.moe.experts.reset_parameters()
        heard = model.eval()(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
        hidden_BH = heard.decision.evidence.mean_hidden(heard.frames.valid_BT)
        remember(model, examples := {code: hidden_BH[:2].repeat(2, 1) for code in LANGUAGES})
        familiar_B = model.mixture.sounds_familiar(heard.decision.evidence, heard.frames, None)
        assert familiar_B.any() and not familiar_B.all()
    save_model(model, tokenizer, tmp_path / "old", examples)
    return tmp_path / "old"


@pytest.fixture
def wider_folder(
    tokenizer_folder: Path, tmp_path: Path, write_texts: Callable[[Path, list[str]], Path]
) -> tuple[Path, int]:
    """The tokenizer with three more letters, and its size."""
    texts = write_texts(tmp_path / "texts.jsonl", ["abxy zy xz"])
    return tmp_path / "wider", extend_tokenizer(tokenizer_folder, texts, tmp_path / "wider", extra_pieces=3).vocab_size


def load(folder: Path) -> PretrainedModel:
    model, _ = load_model(folder)
    assert isinstance(model, PretrainedModel)
    return model


def test_new_languages_change_no_comparison_of_texts(
    folder: Path, wider_folder: tuple[Path, int], tmp_path: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcriber, "_SURE", 1.1)
    extend(str(folder), str(tmp_path / "new"), languages=["haw"], tokenizer=str(wider_folder[0]))
    waves = [audio_S[:n].numpy() for audio_S, n in zip(batch.audio_BS, batch.audio_lengths_B.tolist(), strict=True)]
    old, asleep = (list(transcriber.load(place, "cpu").transcribe(waves)) for place in (folder, tmp_path / "new"))
    awake = transcriber.load(tmp_path / "new", "cpu")
    tokenizer = mixture_of(awake.model).language_tokenizer.languages
    with torch.no_grad():  # as likely as can be, and never the likeliest
        tokenizer.weight[-1], tokenizer.bias[-1] = tokenizer.weight[:-1].mean(0), tokenizer.bias[:-1].mean() - 0.1
    heard = list(awake.transcribe(waves))
    monkeypatch.setattr(transcriber, "_SURE", 0.0)  # nothing is compared
    assert all(each.language_probabilities["haw"] > 0.1 for each in awake.transcribe(waves))
    for before, *after in zip(old, asleep, heard, strict=True):
        assert all((t.text, t.language) == (before.text, before.language) for t in after)
        assert after[0].reliability == before.reliability
        assert all(t.reliability == pytest.approx(before.reliability, rel=1e-6) for t in after)
        assert all(t.language_probabilities["haw"] == 0 for t in after)
    assert [contemporaries(awake.model, n) for n in range(4)] == [3, 3, 3, 4]


def test_extended_and_pruned_models_give_the_same_bits(
    folder: Path, wider_folder: tuple[Path, int], tmp_path: Path, batch: Batch
) -> None:
    extend(str(folder), str(tmp_path / "new"), languages=["haw"], tokenizer=str(wider_folder[0]))
    prune(str(tmp_path / "new"), str(tmp_path / "small"), languages=["fr", "de"])
    old, new, small = load(folder), load(tmp_path / "new"), load(tmp_path / "small")
    assert all(model.mixture.familiarity for model in (old, new, small)), "all know strangers"
    V = old.vocab_size
    with torch.inference_mode():
        for told in (None, torch.tensor([0, 2, 2, 0])):
            before, after = (m(batch.audio_BS, batch.audio_lengths_B, told) for m in (old, new))
            valid_BT = before.frames.valid_BT  # log-probabilities of padding mean nothing
            assert torch.equal(after.log_probs_BTV[..., :V][valid_BT], before.log_probs_BTV[valid_BT])
            assert before.memory_BTD is not None and after.memory_BTD is not None
            assert torch.equal(after.memory_BTD, before.memory_BTD)
            assert torch.equal(after.reliability_B, before.reliability_B)
        assert small.languages == ["de", "fr"]
        pruned = small(batch.audio_BS, batch.audio_lengths_B, torch.tensor([0, 1, 1, 0]))
        assert torch.equal(pruned.memory_BTD, before.memory_BTD)
        heads = old.attention_head, new.attention_head, small.attention_head
        assert all(head is not None for head in heads)
        assert heads[0].prompts == heads[1].prompts[:3] and heads[2].prompts == [heads[0].prompts[n] for n in (0, 2)]
        assert heads[1].prompts[3] == new.whisper_tokenizer.prompt("haw")


def test_training_the_new_touches_no_old_bit(
    folder: Path, wider_folder: tuple[Path, int], tmp_path: Path, batch: Batch
) -> None:
    extend(str(folder), str(tmp_path / "new"), languages=["haw"], tokenizer=str(wider_folder[0]))
    old, new = load(folder), load(tmp_path / "new")
    wake(new)
    trained = train_last_generation(new)
    tuning = FineTuning(lr=0.01, weight_decay=0.1, new_parts_share=0.0)
    optimizer, _ = fine_tuning_optimizer(new, new.sizes.encoder_layers, tuning, steps=6)
    guard(trained, optimizer)
    labels_BU = torch.randint(1, wider_folder[1], batch.labels_BU.shape)
    hawaiian = Batch(**{**vars(batch), "labels_BU": labels_BU, "languages_B": torch.full((4,), 3)})
    start = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    for _ in range(6):
        new.train()
        output = new(hawaiian.audio_BS, hawaiian.audio_lengths_B, hawaiian.languages_B)
        sum(losses(output, hawaiian).values()).backward()
        optimizer.step()
        new.zero_grad()
    changed = set()
    for name, tensor in new.state_dict().items():
        was = old.state_dict()[name]
        changed |= {name.rpartition(".")[2]} if not torch.equal(tensor, start[name]) else set()
        for dim, size in enumerate(was.shape):
            tensor = tensor.narrow(dim, 0, size)
        assert torch.equal(tensor, was), name
    assert changed == {"weight", "bias", "w1_EFD", "b1_EF", "w2_EDF", "b2_ED"}
