"""The `fit` verb on synthetic tones: what a run says, skips and leaves behind."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from mole_asr.asr.fit import AverageWeights, fit
from mole_asr.asr.task import MoleTask, OptimizerConfig
from mole_asr.cli import main
from mole_asr.corpus.manifest import Manifest, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.decode.ngram import load_ngrams
from mole_asr.errors import MoleError


def test_it_says_what_is_left_out_and_lightning_is_silent(command: Callable[..., list[str]]) -> None:
    words = command(trainer__max_epochs=1, data__max_seconds=1.1)
    shown = subprocess.run([sys.executable, "-m", "mole_asr.cli", "fit", *words], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "longer than 1.1 s" in shown.stderr and "train.jsonl" in shown.stderr
    assert not re.search("litlogger|TPU|GPU available|Warning", shown.stderr), shown.stderr


def test_logs_and_configuration_are_kept(command: Callable[..., list[str]], tmp_path: Path) -> None:
    fit(command(trainer__max_epochs=1))
    rows = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    wanted = {"train/loss", "train/ctc", "train/language", "valid/cer", "valid/cer_de", "valid/language_accuracy"}
    assert wanted <= set(rows[0].split(","))
    assert (tmp_path / "run" / "logs" / "version_0" / "config.yaml").exists()
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt"}


def test_the_model_folder_knows_the_training_texts(
    command: Callable[..., list[str]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    fit(command(trainer__max_epochs=1))
    tokenizer = TextTokenizer(tokenizer_folder)
    ngrams = load_ngrams(tmp_path / "run" / "model", tokenizer.vocab_size)
    assert sorted(ngrams) == ["de", "en"]
    for ngram in ngrams.values():
        assert ngram.counts_M.sum() > 0


def test_a_missing_recording_is_skipped_and_named(
    command: Callable[..., list[str]], tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest(tones / "train.jsonl")
    utterances = list(manifest)
    utterances[3] = replace(utterances[3], audio_path=tmp_path / "gone.wav")
    write_manifest(utterances, tmp_path / "holed.jsonl")
    for _ in range(2):  # a run that is complete remembers
        assert main(["fit", *command(data__train_manifest=tmp_path / "holed.jsonl", trainer__max_epochs=1)]) == 1
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()
        head, line = capsys.readouterr().err.splitlines()[-2:]
        assert head == "1 skipped:" and line.startswith("  u3: ") and "gone.wav" in line


def test_what_any_process_skips_is_named_by_the_first(
    command: Callable[..., list[str]], tones: Path, tmp_path: Path
) -> None:
    utterances = list(Manifest(tones / "train.jsonl"))
    utterances[3:7] = [replace(each, audio_path=tmp_path / "gone.wav") for each in utterances[3:7]]
    write_manifest(utterances, tmp_path / "holed.jsonl")
    words = command(data__train_manifest=tmp_path / "holed.jsonl", trainer__max_epochs=1, trainer__devices=2)
    words.append("--trainer.strategy=ddp_find_unused_parameters_true")
    for _ in range(2):  # a run that is complete remembers
        shown = subprocess.run([sys.executable, "-m", "mole_asr.cli", "fit", *words], capture_output=True, text=True)
        at_the_end = shown.stderr.partition("model written")[2].splitlines()[1:]
        assert [line.split(":")[0] for line in at_the_end] == ["4 skipped", "  u3", "  u4", "  u5", "  u6"]
        assert shown.returncode == 1 and (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_no_training_on_what_is_not_there(
    command: Callable[..., list[str]], tones: Path, tmp_path: Path, split: str
) -> None:
    gone = [replace(each, audio_path=tmp_path / "gone.wav") for each in Manifest(tones / f"{split}.jsonl")]
    write_manifest(gone, tmp_path / "gone.jsonl")
    with pytest.raises(MoleError, match=r"gone\.jsonl: no readable utterance; u\d+: .*gone\.wav"):
        fit(command(**{f"data__{split}_manifest": tmp_path / "gone.jsonl"}))
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_the_folder_of_a_run_is_no_file(command: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(MoleError, match=r"output .*/run: is a file; give a folder"):
        fit(command())


def test_ctrl_c_leaves_as_such(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(task: MoleTask, batch: Any, batch_index: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MoleTask, "training_step", interrupt)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning makes the process deaf to the next one
    with pytest.raises(KeyboardInterrupt):
        fit(command())
    assert not (tmp_path / "run" / "model").exists()


def test_the_packaged_config_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def output_of(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            fit([*words, "--print_config"])
        assert not end.value.code
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("output: "))

    assert output_of("--config=conf/asr/prompts5.yaml") == "output: runs/prompts5"
    assert output_of("--config", "conf/asr/prompts5.yaml") == "output: runs/prompts5"
    (tmp_path / "conf" / "asr").mkdir(parents=True)
    (tmp_path / "conf" / "asr" / "prompts5.yaml").write_text("output: mine\n")
    assert output_of("--config=conf/asr/prompts5.yaml") == "output: mine"


@pytest.mark.parametrize(("algorithm", "clipped"), [(None, [0.6, 0.8]), ("norm", [0.6, 0.8]), ("value", [1.0, 1.0])])
def test_gradients_are_clipped_as_asked(tokenizer_folder: Path, algorithm: str | None, clipped: list[float]) -> None:
    task = MoleTask(str(tokenizer_folder), ["de", "en"])
    bias_N = task.model.mixture.language_tokenizer.languages.bias
    bias_N.grad = torch.tensor([3.0, 4.0])
    task.configure_gradient_clipping(None, 1.0, algorithm)
    torch.testing.assert_close(bias_N.grad, torch.tensor(clipped))
    task.configure_gradient_clipping(None, None, algorithm)
    torch.testing.assert_close(bias_N.grad, torch.tensor(clipped))


def test_the_average_of_a_short_run_is_of_its_last_weights() -> None:
    average = AveragedModel(torch.nn.Linear(1, 1, bias=False), avg_fn=AverageWeights(0.98)._kwargs["avg_fn"])
    shares = {}
    for step in range(400):
        model = torch.nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(float(step == 0))  # so that the average is the share of the first weights
        average.update_parameters(model)
        shares[step] = average.module.weight.item()
    assert shares[0] == 1 and shares[10] < 0.01 and shares[100] < 1e-6


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    config = OptimizerConfig(warmup_share=0.1)
    scales = [config.scale(step, 100) for step in range(101)]
    assert scales[0] == pytest.approx(0.1) and max(scales) == 1.0 and scales.index(1.0) in (9, 10)
    assert scales[100] == 0 and all(a > b for a, b in pairwise(scales[10:]))
    assert OptimizerConfig(warmup_share=0.0).scale(0, 1) == 1.0
