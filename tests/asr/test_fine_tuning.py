"""Fine-tuning: what is trained when and how fast, and how the CTC head ends."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from mole_asr.asr.fine_tuning import FineTuning, choose_trained, fine_tuning_optimizer, fit_ctc_head
from mole_asr.asr.losses import ctc_loss, losses
from mole_asr.asr.pretrained import PretrainedModel
from mole_asr.asr.task import MoleTask
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError

from .conftest import LANGUAGES, attention_loss, build_on_whisper


@pytest.fixture
def model(whisper_folder: Path, tokenizer: TextTokenizer) -> PretrainedModel:
    return build_on_whisper(whisper_folder, tokenizer)


def test_stages_and_frozen_parts(model: PretrainedModel, batch: Batch) -> None:
    config = FineTuning(lr=1e-2, frozen_blocks=1, new_lr=1e-2, new_parts_share=0.5, weight_decay=0.1)
    optimizer, schedule = fine_tuning_optimizer(model, 2, config, steps=4)
    changed: list[set[str]] = []
    for step in range(4):
        before = {name: value.clone() for name, value in model.named_parameters()}
        new_only = choose_trained(model, 2, config, step, steps=4)
        output = model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
        total = sum(losses(output, batch).values(), torch.zeros(()))
        if not new_only:
            total = total + attention_loss(model, batch)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        changed.append({name for name, value in model.named_parameters() if not torch.equal(value, before[name])})
        assert new_only == (step < 2)
    assert {name.split(".")[0] for name in changed[0]} == {"mixture", "ctc"}
    later = {name for names in changed[2:] for name in names}
    assert any(name.startswith("encoder.blocks.1.feed_forward.moe.experts.w1") for name in later)
    assert any(name.startswith("attention_head.decoder.blocks.0") for name in later)
    still = ("encoder.stem.", "encoder.blocks.0.", "attention_head.decoder.embedding.")
    assert not [name for name in later if name.startswith(still)]


def test_learning_rates_fall_from_the_top() -> None:
    config = FineTuning(lr=1.0, layer_decay=0.5, new_lr=7.0)
    names = ["ctc.linear.weight", "encoder.norm.weight", "encoder.blocks.2.x", "encoder.blocks.0.x", "encoder.stem.x"]
    assert [config.rate(name, 3) for name in names] == [7.0, 1.0, 1.0, 0.25, 0.125]
    assert config.rate("encoder.blocks.2.feed_forward.moe.router.scores.weight", 3) == 7.0, "starts from nothing"
    frozen = FineTuning(frozen_blocks=1, layer_decay=1.0)
    names = [*names, "attention_head.decoder.norm.weight", "attention_head.decoder.embedding.weight"]
    assert [frozen.rate(name, 3) > 0 for name in names] == [True, True, True, False, False, True, False]
    assert FineTuning(frozen_blocks=99).rate("attention_head.decoder.norm.weight", 3) > 0, "no encoder block"
    assert FineTuning().rate("encoder.stem.first.weight", 3) > 0
    assert [config.scale(step, 100, new=False) > 0 for step in (9, 10)] == [False, True]


def test_trainers_that_cannot_fine_tune_are_refused(
    whisper_folder: Path, tokenizer_folder: Path, tokenizer: TextTokenizer
) -> None:
    config = build_on_whisper(whisper_folder, tokenizer).config
    task = MoleTask(str(tokenizer_folder), LANGUAGES, pretrained=config)
    good: dict[str, Any] = {
        "datamodule": SimpleNamespace(max_seconds=20.0, augment=None),
        "strategy": DDPStrategy(find_unused_parameters=True),
        "precision": "bf16-mixed",
    }
    trainer: Any = SimpleNamespace(**good)
    task._trainer = trainer
    task.on_fit_start()
    for key, value, message in (
        ("strategy", DDPStrategy(), r"trainer\.strategy: .*ddp_find_unused_parameters_true"),
        ("precision", "16-mixed", r"trainer\.precision: .*bf16-mixed"),
    ):
        trainer = SimpleNamespace(**{**good, key: value})
        task._trainer = trainer
        with pytest.raises(MoleError, match=message):
            task.on_fit_start()


def test_the_ctc_head_is_fitted_alone(model: PretrainedModel, batch: Batch) -> None:
    def loss() -> float:
        with torch.no_grad():
            output = model.eval()(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
            return float(ctc_loss(output.log_probs_BTV, output.lengths_B, batch))

    for _ in range(30):  # BatchNorm's statistics are to arrive first, not to be what makes the difference
        model.train()(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
    before, first = {name: value.clone() for name, value in model.named_parameters()}, loss()
    fit_ctc_head(model, [[batch] * 40, [batch] * 20], lr=1e-2)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("ctc.")}
    assert loss() < first / 4
