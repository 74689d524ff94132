"""The `fit` verb on synthetic tones: a resumed run ends as an uninterrupted one; bad data are refused in one line."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mole_asr.asr import fit as fit_module
from mole_asr.asr.checkpoint import load_model
from mole_asr.asr.extend import extend
from mole_asr.asr.fine_tuning import is_new
from mole_asr.asr.fit import fit
from mole_asr.asr.pretrained import PretrainedModel, from_checkpoint
from mole_asr.asr.task import MoleTask, OptimizerConfig
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer, extend_tokenizer, train_tokenizer
from mole_asr.decode.ngram import NGRAM_FILE, load_ngrams
from mole_asr.errors import MoleError

from .conftest import SMALL

RATE_HZ = 16000
UTTERANCES, EPOCHS = 20, 2


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic: each letter is 0.2 s of a tone of its own. 20 utterances in two languages, 0.4 to 1.2 s."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    utterances = []
    for number in range(UTTERANCES):
        text = "".join(rng.choice(list("abcd"), rng.integers(2, 7)))
        hz_S = np.repeat([300.0 * 2 ** "abcd".index(letter) for letter in text], RATE_HZ // 5)
        audio_S = 0.3 * np.sin(2 * np.pi * np.cumsum(hz_S) / RATE_HZ) + 0.01 * rng.standard_normal(len(hz_S))
        path = folder / f"{number}.wav"
        soundfile.write(path, audio_S.astype(np.float32), RATE_HZ)
        seconds = len(audio_S) / RATE_HZ
        language = ("de", "en")[number % 2]
        utterances.append(Utterance(f"u{number}", path, 0.0, seconds, RATE_HZ, text, language, None, len(audio_S)))
    write_manifest(utterances, folder / "train.jsonl")
    write_manifest(utterances[:4], folder / "valid.jsonl")
    return folder


@pytest.fixture
def command(tones: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a small `fit`; every key can be replaced."""

    def words(**changes: Any) -> list[str]:
        keys = {
            "output": tmp_path / "run",
            "data.train_manifest": tones / "train.jsonl",
            "data.valid_manifest": tones / "valid.jsonl",
            "data.tokenizer": tokenizer_folder,
            "data.batch_seconds": 3,
            "data.max_seconds": 3,
            "trainer.accelerator": "cpu",
            "trainer.max_epochs": EPOCHS,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.log_every_n_steps": 1,
            **{f"model.encoder.{key}": list(v) if isinstance(v, tuple) else v for key, v in SMALL.items()},
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [f"--{key}={value}" for key, value in keys.items()]

    return words


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` may catch it."""


class Watch:
    """Notes the rows that each training step sees, and can kill the run at the beginning of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[int]] = []
        self.kill_at: int | None = None
        step = MoleTask.training_step

        def training_step(task: MoleTask, batch: Any, batch_index: int) -> torch.Tensor:
            if task.global_step == self.kill_at:
                raise Killed
            self.rows.append(batch.rows_B.tolist())
            return step(task, batch, batch_index)

        monkeypatch.setattr(MoleTask, "training_step", training_step)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(fit_module, "CHECKPOINT_EVERY_STEPS", 3)
    monkeypatch.setattr(fit_module, "AVERAGE_EVERY_STEPS", 2)
    return Watch(monkeypatch)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_model(output / "model")[0].state_dict()


AUGMENT = {"data__augment": "mole_asr.audio.augment.AugmentConfig"}


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
            assert sorted(row for rows in batches for row in rows) == list(range(UTTERANCES))

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


@pytest.fixture
def on_whisper(command: Callable[..., list[str]], whisper_folder: Path) -> Callable[..., list[str]]:
    """The words of a `fit` that fine-tunes a tiny Whisper."""

    def words(**changes: Any) -> list[str]:
        own = {
            "pretrained.checkpoint": whisper_folder,
            "pretrained.num_mole_blocks": 1,
            "pretrained.language_tokenizer_block": 1,
            "fine_tuning.new_parts_share": 0.3,
            "fine_tuning.new_lr": 0.01,
        }
        rest = [word for word in command(**AUGMENT, **changes) if not word.startswith("--model.encoder")]
        return [*rest, *(f"--model.{key}={value}" for key, value in own.items())]

    return words


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
        if is_new(name):
            assert torch.equal(blended[name], value)
        else:
            torch.testing.assert_close(blended[name], value.lerp(start[name], 0.25))
            moved |= {name} if not torch.allclose(value, start[name], atol=1e-4) else set()
    assert any(name.startswith("attention_head") for name in moved)
    assert any("experts" in name for name in moved)
    with pytest.raises(MoleError, match=r"pretrained_share: is for a start from model\.pretrained"):
        fit(command(model__fine_tuning__pretrained_share=0.5))


def test_utterances_that_whisper_cannot_hold_are_refused_before_the_run(on_whisper: Callable[..., list[str]]) -> None:
    message = refused(on_whisper(data__max_seconds=28))
    assert message.startswith("data.max_seconds: 28, but the model hears 30 s") and message.endswith("at most 27")


@pytest.mark.parametrize(("algorithm", "clipped"), [(None, [0.6, 0.8]), ("norm", [0.6, 0.8]), ("value", [1.0, 1.0])])
def test_gradients_are_clipped_as_asked(tokenizer_folder: Path, algorithm: str | None, clipped: list[float]) -> None:
    task = MoleTask(str(tokenizer_folder), ["de", "en"])
    bias_N = task.model.mixture.language_tokenizer.languages.bias
    bias_N.grad = torch.tensor([3.0, 4.0])
    task.configure_gradient_clipping(None, 1.0, algorithm)
    torch.testing.assert_close(bias_N.grad, torch.tensor(clipped))
    task.configure_gradient_clipping(None, None, algorithm)
    torch.testing.assert_close(bias_N.grad, torch.tensor(clipped))


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


# --- what cannot be trained, in one line


def refused(words: list[str]) -> str:
    with pytest.raises(MoleError) as caught:
        fit(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    for changes in ({"model__encoder__d_ff": 32}, {"model__encoder__num_mole_blocks": 0}):
        assert "other model sizes: give another --output" in refused(command(**changes))


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


def test_a_missing_recording_is_skipped_and_named(
    command: Callable[..., list[str]], tones: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Manifest(tones / "train.jsonl")
    utterances = list(manifest)
    utterances[3] = replace(utterances[3], audio_path=tmp_path / "gone.wav")
    write_manifest(utterances, tmp_path / "holed.jsonl")
    fit(command(data__train_manifest=tmp_path / "holed.jsonl", trainer__max_epochs=1))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert [record for record in caplog.records if "u3" in record.getMessage() and "gone.wav" in record.getMessage()]


# --- what else a run does


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
    V = TextTokenizer(tokenizer_folder).vocab_size
    old_ngrams = load_ngrams(tmp_path / "old" / "model" / NGRAM_FILE, V)
    ngrams = load_ngrams(tmp_path / "new" / "model" / NGRAM_FILE, V + 1)
    assert set(ngrams) == {"de", "en", "nl"}
    for code in ("de", "en"):
        assert np.array_equal(ngrams[code].log_probs([1])[[*range(V), V + 1]], old_ngrams[code].log_probs([1]))
    with pytest.raises(MoleError, match="nothing old"):
        fit([*command(output=tmp_path / "third"), "--model.freeze_old=true"])


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
    ngrams = load_ngrams(tmp_path / "run" / "model" / NGRAM_FILE, tokenizer.vocab_size)
    assert sorted(ngrams) == ["de", "en"]
    for ngram in ngrams.values():
        assert ngram.counts_M.sum() > 0


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    config = OptimizerConfig(warmup_share=0.1)
    scales = [config.scale(step, 100) for step in range(101)]
    assert scales[0] == pytest.approx(0.1) and max(scales) == 1.0 and scales.index(1.0) in (9, 10)
    assert scales[100] == 0 and all(a > b for a, b in pairwise(scales[10:]))
    assert OptimizerConfig(warmup_share=0.0).scale(0, 1) == 1.0
