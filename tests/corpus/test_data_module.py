"""The data module on small synthetic recordings: what it leaves out, reads, survives, and where it resumes."""

import json
import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mole_asr.audio.augment import AugmentConfig
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.data_module import SpeechDataModule
from mole_asr.errors import MoleError

RATE_HZ = 16000


def write_corpus(folder: Path, durations_s: list[float], texts: list[str], languages: list[str]) -> Path:
    """One wav an utterance (its level tells which) and a cut set."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (duration_s, text, language) in enumerate(zip(durations_s, texts, languages, strict=True)):
        samples = round(duration_s * RATE_HZ)
        path = folder / f"{i}.wav"
        soundfile.write(path, np.full(samples, (i + 1) / 100, np.float32), RATE_HZ, subtype="PCM_16")
        recording = {
            "id": f"u{i}",
            "sources": [{"type": "file", "channels": [0], "source": str(path)}],
            "sampling_rate": RATE_HZ,
            "num_samples": samples,
            "duration": samples / RATE_HZ,
            "channel_ids": [0],
        }
        times = {"start": 0.0, "duration": samples / RATE_HZ, "channel": 0}
        supervision = {"id": f"u{i}", "recording_id": f"u{i}", **times, "text": text, "language": language}
        cut = {"id": f"u{i}", **times, "supervisions": [supervision], "recording": recording, "type": "MonoCut"}
        lines.append(json.dumps(cut))
    manifest = folder / "cuts.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abcd dcba", "aabb ccdd", "ab cd"]),
        model_prefix=str(folder / "tokenizer"),
        model_type="char",
        vocab_size=7,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece="<blank>",
        minloglevel=2,
    )
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 utterances of 0.3 to 1.4 s in two languages: 11 batches of 3 s, 12 with room for slower speech."""
    durations_s = [0.3 + 0.05 * i for i in range(23)]
    return write_corpus(
        tmp_path_factory.mktemp("corpus"), durations_s, ["ab cd"] * 23, ["fr", "de", "fr"] * 7 + ["de"] * 2
    )


def module(manifest: Path, tokenizer: str, valid: Path | None = None, **settings: Any) -> SpeechDataModule:
    settings = {"batch_seconds": 3.0, "max_seconds": 2.0, **settings}
    return SpeechDataModule(str(manifest), str(valid or manifest), tokenizer, **settings)


def ready(*args: Any, **settings: Any) -> SpeechDataModule:
    data = module(*args, **settings)
    data.setup("fit")
    return data


# --- what a batch holds


def test_a_batch_holds_the_audio_labels_and_language_of_its_rows(corpus: Path, tokenizer: str) -> None:
    data = ready(corpus, tokenizer, languages=["xx", "fr", "de"])
    seen = []
    for batch in data.train_dataloader():
        assert len(batch) * float(batch.audio_lengths_B.max()) / RATE_HZ <= 3.0
        for i, row in enumerate(batch.rows_B.tolist()):
            length = int(batch.audio_lengths_B[i])
            assert length == round((0.3 + 0.05 * row) * RATE_HZ)
            np.testing.assert_allclose(batch.audio_BS[i, :length], (row + 1) / 100, atol=1e-4)
            assert not batch.audio_BS[i, length:].any()
            assert batch.labels_BU[i].tolist() == data.tokenizer.encode("ab cd")
            assert batch.ids[i] == f"u{row}" and batch.texts[i] == "ab cd"
            assert batch.languages_B[i] == (2 if row % 3 == 1 or row > 20 else 1)
        assert (batch.languages_B.diff() >= 0).all()
        seen += batch.rows_B.tolist()
    assert sorted(seen) == list(range(23))
    assert len(list(data.train_dataloader())) == len(data.train_dataloader())


def test_languages_default_to_those_of_the_train_manifest(corpus: Path, tokenizer: str) -> None:
    data = module(corpus, tokenizer)
    assert data.languages == ["de", "fr"]
    assert data.vocab_size == 7


def test_a_cut_reads_only_its_part_of_the_recording(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    ramp_S = np.linspace(0, 0.9, 2 * RATE_HZ, dtype=np.float32)
    soundfile.write(tmp_path / "ramp.wav", ramp_S, RATE_HZ, subtype="FLOAT")
    cut = json.loads(corpus.read_text(encoding="utf-8").splitlines()[0])
    cut["recording"]["sources"][0]["source"] = str(tmp_path / "ramp.wav")
    cut["recording"].update(num_samples=2 * RATE_HZ, duration=2.0)
    cut.update(start=0.5, duration=0.25)
    cut["supervisions"][0].update(start=0.0, duration=0.25)
    (tmp_path / "cut.jsonl").write_text(json.dumps(cut) + "\n", encoding="utf-8")
    (batch,) = ready(tmp_path / "cut.jsonl", tokenizer).train_dataloader()
    np.testing.assert_allclose(batch.audio_BS[0], ramp_S[8000:12000], atol=1e-6)


# --- what is left out


def test_unusable_utterances_are_counted_and_named(
    tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    durations_s = [1.0, 1.0, 3.0, 0.05, 1.0, 0.2, 0.2]
    #        5 frames fit "abcd" and the leading space; "aabb" needs two blanks more
    texts = ["ab", "ab", "ab", "ab", "", "abcd", "aabb"]
    languages = ["de", "fr", "de", "de", "de", "de", "de"]
    manifest = write_corpus(tmp_path, durations_s, texts, languages)
    with caplog.at_level(logging.INFO):
        data = ready(manifest, tokenizer, languages=["de"])
    selection = data.selections["train"]
    assert selection.rows.tolist() == [0, 5]
    assert selection.left_out == {
        "without a language that the model has": 1,
        "longer than 2 s": 1,
        "shorter than 0.1 s": 1,
        "with an empty text": 1,
        "with more labels than frames": 1,
    }
    assert str(selection) in caplog.text


def test_a_model_with_shorter_frames_has_more_of_them(tokenizer: str, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, [0.1, 0.09], ["abcd", "abcd"], ["de", "de"])
    data = module(manifest, tokenizer, min_seconds=0.05)
    data.frame_shift_s = 0.02
    data.setup("fit")
    assert data.selections["train"].rows.tolist() == [0]  # 5 frames fit "abcd" and the leading space


def test_the_fastest_perturbation_must_still_have_enough_frames(tokenizer: str, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, [0.2, 1.0], ["abcd", "abcd"], ["de", "de"])
    assert len(ready(manifest, tokenizer).selections["train"].rows) == 2
    data = ready(manifest, tokenizer, augment=AugmentConfig(speed_probability=1.0, speeds=(1.1,)))
    assert data.selections["train"].rows.tolist() == [1]
    assert data.selections["valid"].rows.tolist() == [0, 1]


def test_nothing_left_is_one_line_with_the_reasons(tokenizer: str, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, [3.0, 1.0], ["ab", ""], ["de", "de"])
    with pytest.raises(
        MoleError, match=r"cuts\.jsonl: nothing to train on: 0 .*1 longer than 2 s, 1 with an empty"
    ) as error:
        ready(manifest, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.5}, "data.temperature: 0.5"),
        ({"temperature": float("nan")}, "data.temperature: nan"),
        ({"batch_seconds": 0.0}, "data.batch_seconds: 0 must be positive"),
        ({"valid_batch_seconds": -1.0}, "data.valid_batch_seconds: -1 must be positive"),
        ({"max_batch_labels": 0}, "data.max_batch_labels: 0 must be positive"),
        ({"seed": -1}, "data.seed -1: must be"),
        ({"languages": ["de", "de"]}, "data.languages: de stands twice"),
    ],
)
def test_bad_settings_are_named(corpus: Path, tokenizer: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MoleError, match=message):
        module(corpus, tokenizer, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_are_reported_once_and_skipped(
    tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    manifest = write_corpus(tmp_path, [0.5] * 6 + [1.9], ["ab"] * 7, ["de"] * 7)
    (tmp_path / "2.wav").unlink()
    (tmp_path / "3.wav").write_bytes(b"not audio")
    soundfile.write(tmp_path / "4.wav", np.full(4000, 0.1, np.float32), RATE_HZ)  # half of what the manifest says
    (tmp_path / "6.wav").unlink()  # alone in its batch
    loader = ready(manifest, tokenizer, num_workers=num_workers).train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        rows = [row for batch in batches for row in batch.rows_B.tolist()]
        assert sorted(rows) == [-1, 0, 1, 5]
    assert [sum(f"skipped u{i}: " in line for line in caplog.messages) for i in range(7)] == [0, 0, 1, 1, 1, 0, 1]
    (stand_in,) = [batch for batch in batches if -1 in batch.rows_B.tolist()]
    assert stand_in.label_lengths_B.tolist() == [0] and stand_in.languages_B.tolist() == [-1]
    assert stand_in.audio_BS.shape[1] > 0 and not stand_in.audio_BS.any()


# --- what does not matter: workers, processes


def content(batches: list[Batch]) -> list[bytes]:
    return [batch.audio_BS.numpy().tobytes() + batch.rows_B.numpy().tobytes() for batch in batches]


LOUD = AugmentConfig(noise_probability=1.0, telephone_probability=0.5, gain_probability=1.0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A worker computes with one thread; with more of them, the resampling rounds its last bit differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_workers_change_nothing(corpus: Path, tokenizer: str) -> None:
    alone, helped = (
        content(list(ready(corpus, tokenizer, num_workers=workers, augment=LOUD).train_dataloader()))
        for workers in (0, 2)
    )
    assert alone == helped


def test_the_dataset_survives_a_spawned_process(corpus: Path, tokenizer: str) -> None:
    loader = ready(corpus, tokenizer, augment=LOUD).train_dataloader()
    key = (3, 1, np.array([4, 2, 9]))
    twin = pickle.loads(pickle.dumps(loader.dataset))
    assert content([loader.dataset[key]]) == content([twin[key]])
    assert content([loader.dataset[(4, 1, key[2])]]) != content([loader.dataset[key]]), "every epoch sounds the same"


def test_loading_leaves_the_global_generator_alone(corpus: Path, tokenizer: str) -> None:
    state = torch.random.get_rng_state()
    list(ready(corpus, tokenizer, augment=LOUD).train_dataloader())
    assert torch.equal(state, torch.random.get_rng_state())


# --- where a run goes on


class KilledError(Exception):
    pass


class Recorder(LightningModule):
    """Notes (epoch, rows) of every finished training step; dies at a wanted one."""

    def __init__(self, die_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.die_at = die_at
        self.steps: list[tuple[int, tuple[int, ...]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        if (self.current_epoch, batch_idx) == self.die_at:
            raise KilledError
        self.steps.append((self.current_epoch, tuple(batch.rows_B.tolist())))
        return self.weight * batch.audio_BS.mean() + self.weight**2

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch.rows_B.tolist()
        self.log("loss", 0.0, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    data: SpeechDataModule,
    recorder: Recorder,
    checkpoint: ModelCheckpoint | None = None,
    resume: Path | None = None,
    **settings: Any,
) -> Trainer:
    trainer = Trainer(
        **{"max_epochs": 3, **settings},
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoint] if checkpoint else [],
        enable_checkpointing=checkpoint is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(recorder, data, ckpt_path=resume, weights_only=False)
    return trainer


EVERY_5 = {"every_n_train_steps": 5}
EVERY_12 = {"every_n_train_steps": 12}  # 12 batches an epoch: exactly after the last one
EVERY_4 = {"every_n_train_steps": 4}  # with MID_VALIDATION: just before each validation
VALIDATION_END = {"monitor": "loss"}
EXCEPTION = {"save_on_exception": True, "every_n_epochs": 9}
EPOCH_END = {"every_n_epochs": 1}
TRAIN_EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
STEPS = {"max_epochs": -1, "max_steps": 36}
MID_VALIDATION = {"val_check_interval": 4}


@pytest.mark.parametrize(
    ("saving", "die_at", "settings", "num_workers"),
    [
        (EVERY_5, (0, 7), {}, 0),
        (EVERY_5, (1, 4), {}, 0),
        (EVERY_5, (1, 4), {}, 2),
        (EVERY_5, (1, 4), STEPS, 0),
        (EVERY_5, (1, 4), MID_VALIDATION, 0),
        (EVERY_5, (1, 4), {"accumulate_grad_batches": 2}, 0),
        (EVERY_4, (1, 6), MID_VALIDATION, 0),
        (EVERY_12, (1, 4), {}, 0),
        (EVERY_12, (1, 4), {}, 2),
        (EVERY_12, (1, 4), STEPS, 0),
        (EVERY_12, (1, 4), MID_VALIDATION, 0),
        (VALIDATION_END, (1, 6), MID_VALIDATION, 0),
        (VALIDATION_END, (2, 2), MID_VALIDATION, 0),
        (VALIDATION_END, (1, 6), {**MID_VALIDATION, **STEPS}, 0),
        (EXCEPTION, (1, 6), {}, 0),
        (EXCEPTION, (1, 6), {**MID_VALIDATION, **STEPS}, 0),
        (EPOCH_END, (2, 4), {}, 0),
        (EPOCH_END, (2, 4), STEPS, 0),
        (TRAIN_EPOCH_END, (2, 4), {}, 0),
        (TRAIN_EPOCH_END, (2, 4), STEPS, 0),
    ],
)
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(
    corpus: Path,
    tokenizer: str,
    tmp_path: Path,
    saving: dict[str, Any],
    die_at: tuple[int, int],
    settings: dict[str, Any],
    num_workers: int,
) -> None:
    whole = Recorder()
    fit(tmp_path, module(corpus, tokenizer, augment=LOUD), whole, **settings)
    assert len(whole.steps) == 36
    for epoch in range(3):
        rows = Counter(row for e, rows in whole.steps if e == epoch for row in rows)
        assert rows == Counter(range(23)), f"epoch {epoch}"
    if settings == MID_VALIDATION:
        assert Counter(whole.validated) == Counter(list(range(23)) * 9)

    killed, checkpoint = Recorder(die_at), ModelCheckpoint(tmp_path / "old", "last", **saving)
    with pytest.raises(KilledError):
        fit(tmp_path, module(corpus, tokenizer, augment=LOUD, num_workers=num_workers), killed, checkpoint, **settings)
    path = tmp_path / "old" / "last.ckpt"
    progress = torch.load(path, weights_only=False)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    saved = progress["total"]["processed"]
    assert 0 < saved <= len(killed.steps)

    resumed, checkpoint = Recorder(), ModelCheckpoint(tmp_path / "new", **saving)
    data = module(corpus, tokenizer, augment=LOUD, num_workers=num_workers)
    fit(tmp_path, data, resumed, checkpoint, path, **settings)
    assert killed.steps[:saved] + resumed.steps == whole.steps
    assert torch.equal(resumed.weight, whole.weight), "the same rows, but not the same audio"


def test_a_changed_plan_is_reported_on_resume(corpus: Path, tokenizer: str, caplog: pytest.LogCaptureFixture) -> None:
    state = ready(corpus, tokenizer).train_dataloader().state_dict()
    ready(corpus, tokenizer).train_dataloader().load_state_dict(state)
    assert not caplog.messages
    ready(corpus, tokenizer, batch_seconds=5.0).train_dataloader().load_state_dict(state)
    assert "repeats or misses" in caplog.text
