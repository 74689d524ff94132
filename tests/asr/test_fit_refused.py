"""The `fit` verb, asked for what cannot be: one line that names the key, the value or the file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mole_asr.asr.fit import fit
from mole_asr.corpus.manifest import Manifest, write_manifest

from .conftest import refused


def copy_manifest(tones: Path, path: Path, **changes: Any) -> Path:
    """The train manifest with other values in the fields of its utterances."""
    write_manifest((replace(utterance, **changes) for utterance in Manifest(tones / "train.jsonl")), path)
    return path


def test_no_utterance_is_left(command: Callable[..., list[str]], tones: Path, tmp_path: Path) -> None:
    message = refused(command(data__max_seconds=0.3))
    assert "train.jsonl: nothing to train on" in message and "20 longer than 0.3 s" in message
    wordy = copy_manifest(tones, tmp_path / "wordy.jsonl", text="abcd " * 20)
    assert "20 with more labels than frames" in refused(command(data__train_manifest=wordy))
    silent = copy_manifest(tones, tmp_path / "silent.jsonl", text="")
    message = refused(command(data__valid_manifest=silent))
    assert "silent.jsonl: nothing to validate on" in message and "with an empty text" in message
    assert "without a language that the model has" in refused(command(data__languages="[xx]"))
    assert not (tmp_path / "run" / "model").exists()


def test_a_label_needs_a_frame_of_the_model_that_is_trained(
    command: Callable[..., list[str]], on_whisper: Callable[..., list[str]], tones: Path, tmp_path: Path
) -> None:
    wordy = copy_manifest(tones, tmp_path / "wordy.jsonl", text="abcd " * 8)
    silent = copy_manifest(tones, tmp_path / "silent.jsonl", text="")
    changes = {"data__train_manifest": wordy, "data__valid_manifest": silent}
    assert "wordy.jsonl: nothing to train on" in refused(command(**changes))
    assert "silent.jsonl: nothing to validate on" in refused(on_whisper(**changes))  # Whisper has twice the frames


def test_a_training_that_diverges_writes_no_model(command: Callable[..., list[str]], tmp_path: Path) -> None:
    changes = {"model__optimizer__adamw_lr": 1e30, "model__optimizer__lr": 1e30}
    assert "the training has diverged" in refused(command(trainer__max_epochs=1, **changes))
    assert not (tmp_path / "run" / "model").exists()


def test_a_checkpoint_that_was_cut_off_is_named(command: Callable[..., list[str]], tmp_path: Path) -> None:
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"PK\x03\x04 and no end")
    assert refused(command()) == f"{checkpoint}: cannot be read, it is cut off; remove it to train anew"
    fit(command(trainer__max_epochs=1, ckpt_path="null"))
    assert (tmp_path / "run/model/model.safetensors").exists(), "nobody asked for the checkpoint"


def test_sections_that_a_pretrained_model_does_not_read(on_whisper: Callable[..., list[str]]) -> None:
    for changes, section in (
        ({"model__encoder__reliability": "entropy"}, "encoder"),
        ({"model__optimizer__lr": 0.5}, "optimizer"),
    ):
        words = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
        assert refused([*on_whisper(), *words]).startswith(f"model.{section}: is not for ")


def test_utterances_that_whisper_cannot_hold_are_refused_before_the_run(on_whisper: Callable[..., list[str]]) -> None:
    message = refused(on_whisper(data__max_seconds=28))
    assert message.startswith("data.max_seconds: 28, but the model hears 30 s") and message.endswith("at most 27")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model__encoder__d_modle": 8}, ["model.encoder.d_modle", "did you mean model.encoder.d_model?"]),
        ({"data__batch_secs": 8}, ["data.batch_secs", "did you mean data.batch_seconds?"]),
        ({"colour": "red"}, ["unknown key colour"]),
        ({"trainer__max_epochs": "many"}, ["trainer.max_epochs", "many", "int"]),
        ({"model__encoder__reliability": "guess"}, ["model.encoder.reliability", "guess", "max_posterior"]),
        ({"model__encoder__kernel_size": 4}, ["model.encoder.kernel_size: 4 must be odd"]),
        ({"data__temperature": 0.5}, ["temperature: 0.5 is below 1"]),
        ({"data__batch_seconds": 0}, ["batch_seconds: 0 must be positive"]),
        ({"data__train_manifest": "nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"data__tokenizer": "nowhere"}, ["nowhere"]),
        ({"model__init_from": "nowhere"}, ["nowhere/config.json"]),
        ({"seed_everything": -1}, ["seed_everything -1: must be from 0 to 4294967295"]),
        ({"average_decay": 1.0}, ["average_decay: 1 must be from 0 to below 1"]),
        ({"average_decay": ".nan"}, ["average_decay: nan must be"]),
        ({"model__loss_weights__ctc": -1}, ["model.loss_weights.ctc: -1 must be finite and not negative"]),
        ({"model__optimizer__lr": -0.1}, ["model.optimizer.lr: -0.1 must be finite and not negative"]),
        ({"model__optimizer__warmup_share": 5}, ["model.optimizer.warmup_share: 5 must be from 0 to 1"]),
        ({"model__scheduled_share": 2}, ["model.scheduled_share: 2 must be from 0 to 1"]),
        ({"model__encoder__temperature": ".nan"}, ["model.encoder.temperature: nan must be positive"]),
        ({"model__fine_tuning__lr": -1}, ["model.fine_tuning.lr: -1 must be finite and not negative"]),
        ({"model__fine_tuning__lr": 0.1}, ["model.fine_tuning: is for a pretrained model"]),
    ],
)
def test_a_wrong_key_or_value_is_named(
    command: Callable[..., list[str]], changes: dict[str, Any], parts: list[str]
) -> None:
    message = refused(command(**changes))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ("data:\n  batch_second: 3\n", ["data.batch_second", "did you mean data.batch_seconds?"]),
        (
            "data:\n  augment:\n    class_path: mole_asr.audio.augment.AugmentConfig\n"
            "    init_args:\n      noise_probabilty: 0.1\n",
            ["data.augment.noise_probabilty", "did you mean data.augment.noise_probability?"],
        ),
        ("data: [\n", ["config"]),
        (None, ["config.yaml"]),
    ],
)
def test_a_wrong_key_in_the_config_file_is_named(
    command: Callable[..., list[str]], tmp_path: Path, lines: str | None, parts: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    if lines is not None:
        path.write_text(lines)
    message = refused([f"--config={path}", *command()])
    assert all(part in message for part in parts), message
