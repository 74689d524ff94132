"""The `fit` verb, killed and started again: it ends as an uninterrupted run, bit by bit."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_asr.asr.fit import fit
from mole_asr.asr.task import MoleTask
from mole_asr.corpus.text_tokenizer import train_tokenizer
from tests.killed import Killed, Watch

from .conftest import AUGMENT, NUM_TONES, refused, weights

EPOCHS = 2  # of `command`


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch, MoleTask)


@pytest.mark.parametrize(
    "changes",
    [
        {**AUGMENT, "model__encoder__reliability": "gumbel"},
        {"average_decay": 0.0, "data__temperature": 2.0, "trainer__gradient_clip_val": 1.0},
    ],
    ids=["average, augmentation, gumbel", "plain, resampled languages"],
)
@pytest.mark.parametrize("kill_at", [5, 8, -1], ids=["first epoch", "behind an epoch", "last epoch"])
def test_a_run_killed_in_mid_epoch_and_resumed_ends_as_an_uninterrupted_one(
    command: Callable[..., list[str]], watch: Watch, tmp_path: Path, changes: dict[str, Any], kill_at: int
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    fit(command(output=whole, **changes))
    uninterrupted, watch.rows = watch.rows, []
    steps = len(uninterrupted)
    per_epoch = steps // EPOCHS
    assert per_epoch >= 7
    if "data__temperature" not in changes:
        for epoch in range(EPOCHS):
            batches = uninterrupted[epoch * per_epoch : (epoch + 1) * per_epoch]
            assert sorted(row for rows in batches for row in rows) == list(range(NUM_TONES))

    watch.kill_at = kill_at % steps
    # The last checkpoint: at every third step, and at the end of an epoch.
    saved = max(watch.kill_at - watch.kill_at % 3, watch.kill_at - watch.kill_at % per_epoch)
    assert saved < watch.kill_at
    with pytest.raises(Killed):
        fit(command(output=halves, **changes))
    assert watch.rows == uninterrupted[: watch.kill_at]
    assert not (halves / "model").exists()

    watch.rows, watch.kill_at = [], None
    torch.manual_seed(12345)  # what the new process draws before must not matter
    fit(command(output=halves, **changes))
    assert watch.rows == uninterrupted[saved:]
    expected, found = weights(whole), weights(halves)
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different


def test_fine_tuning_killed_in_both_stages_ends_as_an_uninterrupted_one(
    on_whisper: Callable[..., list[str]], watch: Watch, tmp_path: Path
) -> None:
    def words(output: str) -> list[str]:
        return on_whisper(output=tmp_path / output, trainer__gradient_clip_val=1.0)

    fit(words("whole"))
    steps, watch.rows = len(watch.rows), []
    first_of_second_stage = round(0.3 * steps)
    for kill_at in (first_of_second_stage - 1, steps - 2):  # checkpoints lie before, at every third step
        watch.kill_at = kill_at
        with pytest.raises(Killed):
            fit(words("parts"))
    watch.kill_at = None
    fit(words("parts"))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


# A training process that the system kills at the beginning of a step: no clean-up, nothing flushed.
RUN_TO_STEP = """
import os, signal, sys, torch
from mole_asr.asr import fit as fit_module
from mole_asr.asr.task import MoleTask

kill_at, step = int(sys.argv[1]), MoleTask.training_step

def training_step(task, batch, batch_index):
    if task.global_step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(task, batch, batch_index)

torch.set_num_threads(int(sys.argv[2]))
MoleTask.training_step = training_step
fit_module.CHECKPOINT_EVERY_STEPS, fit_module.AVERAGE_EVERY_STEPS = 3, 2  # as `watch` does
fit_module.fit(sys.argv[3:])
"""


def test_a_process_killed_by_the_system_goes_on_in_a_new_one(
    command: Callable[..., list[str]], watch: Watch, tmp_path: Path
) -> None:
    fit(command(output=tmp_path / "whole"))
    steps = len(watch.rows)
    words = [str(torch.get_num_threads()), *command(output=tmp_path / "killed")]
    run = [sys.executable, "-c", RUN_TO_STEP]
    killed = subprocess.run([*run, "5", *words], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoints" / "last.ckpt").exists()
    resumed = subprocess.run([*run, str(steps), *words], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_complete_run_is_not_trained_further(
    command: Callable[..., list[str]], watch: Watch, tmp_path: Path, precision: str
) -> None:
    fit(command(trainer__precision=precision))
    first, watch.rows = weights(tmp_path / "run"), []
    fit(command(trainer__precision=precision))
    assert watch.rows == []
    again = weights(tmp_path / "run")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_complete_run_goes_on_when_more_epochs_are_wanted(
    command: Callable[..., list[str]], watch: Watch, tmp_path: Path
) -> None:
    fit(command(trainer__max_epochs=3, output=tmp_path / "three"))
    expected, watch.rows = watch.rows, []
    fit(command(trainer__max_epochs=1))
    fit(command(trainer__max_epochs=3))
    assert watch.rows == expected


def test_a_resumed_run_must_have_the_same_pieces_and_languages(
    command: Callable[..., list[str]], tmp_path: Path, write_texts: Callable[[Path, list[str]], Path]
) -> None:
    fit(command(trainer__max_epochs=1))
    (tmp_path / "other").mkdir()
    for text in ("dcba abcd ab", "abcd xyz"):  # as many pieces in another order or with other weights; more pieces
        texts = write_texts(tmp_path / "other" / "texts.jsonl", [text])
        train_tokenizer(texts, tmp_path / "other", vocab_size=50, byte_fallback=False, model_type="char")
        assert "another text tokenizer" in refused(command(data__tokenizer=tmp_path / "other"))
    assert "other languages" in refused(command(data__languages="[en, de]"))
    assert "other languages" in refused(command(data__languages="[de, en, fr]"))


def test_a_resumed_run_must_have_the_same_sizes_and_no_fewer_epochs(command: Callable[..., list[str]]) -> None:
    fit(command(trainer__max_epochs=3))
    assert "trainer.max_epochs: the run to resume has more epochs than 1: give" in refused(
        command(trainer__max_epochs=1)
    )
    assert "model.encoder.reliability: the run to resume has max_posterior, not entropy: give another" in refused(
        command(trainer__max_epochs=3, model__encoder__reliability="entropy")
    )
    for changes in ({"model__encoder__d_ff": 32}, {"model__encoder__num_mole_blocks": 0}):
        assert "other model sizes: give another --output" in refused(command(**changes))
