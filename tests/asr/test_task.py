"""The sum of the losses and the error rate of the validation."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from mole_asr.asr.task import LossWeights, MoleTask
from mole_asr.corpus.batch import Batch, Example, collate

from .conftest import LANGUAGES, small_config

WEIGHTS = LossWeights(ctc=0.7, intermediate_ctc=0.25, language=0.15, reliability=0.05)


@pytest.fixture
def task(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A task that notes what it logs, beside a trainer that knows how long the training is."""
    task = MoleTask(str(tokenizer_folder), LANGUAGES, small_config(reliability="sigmoid"), WEIGHTS)
    task.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", 10)
    task.logged = {}
    monkeypatch.setattr(task, "log", lambda name, value, **_: task.logged.update({name: float(value)}))
    monkeypatch.setattr(task, "log_dict", lambda values, **_: [task.log(name, v) for name, v in values.items()])
    monkeypatch.setattr(task, "print", lambda *_: None)
    return task


def test_the_loss_is_the_weighted_sum_of_the_named_ones(task: Any, batch: Batch) -> None:
    total = task.training_step(batch, 0)
    named = {name: task.logged[f"train/{name}"] for name in ("ctc", "intermediate_ctc", "language", "reliability")}
    wanted = 0.7 * named["ctc"] + 0.25 * named["intermediate_ctc"] + 0.15 * named["language"]
    assert total.item() == pytest.approx(wanted + 0.05 * named["reliability"], rel=1e-5)
    assert total.item() == pytest.approx(task.logged["train/loss"])


def test_what_stands_in_for_an_unreadable_batch_teaches_nothing(task: Any, batch: Batch) -> None:
    silence = collate([Example(np.zeros(16000, np.float32), np.zeros(0, np.int64), -1, -1, "", "")], ["u1: gone"])
    total = task.training_step(silence, 0)
    total.backward()
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    assert total.item() == 0 and gradients and not any(each.any() for each in gradients)
    counts: dict[str, int] = {}
    task.log = lambda name, value, batch_size, **_: counts.update({name: batch_size})
    task.validation_step(silence, 0)
    assert counts == {"valid/language_accuracy": 0, "valid/mean_reliability": 0}, "they have no weight in the means"
    assert not task._counts_N3.any()


def test_a_step_draws_the_same_numbers_whatever_was_drawn_before(task: Any, batch: Batch) -> None:
    first = task.training_step(batch, 3).item()
    torch.rand(7)
    assert task.training_step(batch, 3).item() == first
    assert task.training_step(batch, 4).item() != first


def test_the_error_rate_is_a_mean_over_languages_of_errors_by_characters(
    task: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"a": "a", "ab cd": "abcd", "d c": "d cd", "abc": ""}  # 0 of 1; 1 of 5 and 1 of 3; 3 of 3
    heard = iter([said[text] for text in batch.texts])
    monkeypatch.setattr(task, "text_tokenizer", SimpleNamespace(decode=lambda ids: next(heard)))
    task.eval()
    with torch.no_grad():
        task.validation_step(batch, 0)
    task.on_validation_epoch_end()
    rates = [task.logged[f"valid/cer_{code}"] for code in LANGUAGES]
    assert rates == pytest.approx([0.0, 100 * 2 / 8, 100.0])
    assert task.logged["valid/cer"] == pytest.approx(sum(rates) / 3)


def test_the_experts_gradients_are_logged_with_the_other_figures(
    task: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.training_step(batch, 0).backward()
    monkeypatch.setattr(task.trainer, "log_every_n_steps", 2)
    task.on_before_optimizer_step(None)
    assert not any(name.startswith("gradient/") for name in task.logged)
    monkeypatch.setattr(task.trainer, "log_every_n_steps", 1)
    task.on_before_optimizer_step(None)
    assert {name for name in task.logged if name.startswith("gradient/")} == {
        f"gradient/{name}" for name in (*LANGUAGES, "agnostic")
    }
    assert task.logged["gradient/agnostic"] > 0
