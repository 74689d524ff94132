"""A small model, a character tokenizer, and a batch of noise: everything here is synthetic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from mole_asr.asr.checkpoint import load_model
from mole_asr.asr.fit import fit
from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.asr.pretrained import PretrainedConfig, PretrainedModel, from_checkpoint
from mole_asr.corpus.batch import Batch, Example, collate
from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer, train_tokenizer
from mole_asr.errors import MoleError

LANGUAGES = ["de", "en", "fr"]
SMALL = {
    "d_model": 16,
    "d_ff": 24,
    "num_blocks": 3,
    "num_mole_blocks": 1,
    "language_tokenizer_block": 1,
    "num_heads": 2,
    "kernel_size": 7,
    "dropout": 0.1,
    "num_mels": 20,
    "intermediate_ctc_blocks": (2,),
}
RATE_HZ = 16000
NUM_TONES = 20
AUGMENT = {"data__augment": "mole_asr.audio.augment.AugmentConfig"}  # for `command`


def small_config(**changes: Any) -> EncoderConfig:
    """A config whose sizes do not depend on the defaults."""
    return EncoderConfig(**{**SMALL, **changes})


@pytest.fixture(scope="session")
def write_texts() -> Callable[[Path, list[str]], Path]:
    """Writes a manifest of texts, for tokenizers; its audio does not exist."""

    def write(path: Path, texts: list[str]) -> Path:
        no_audio = path.parent / "none.wav"
        write_manifest(
            (
                Utterance(f"t{i}", no_audio, 0.0, 1.0, 16000, text, "en", num_samples=16000)
                for i, text in enumerate(texts)
            ),
            path,
        )
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, write_texts: Callable[[Path, list[str]], Path]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(
        write_texts(folder / "texts.jsonl", ["abcd dcba", "aabb ccdd ab"]),
        folder,
        vocab_size=50,
        byte_fallback=False,
        model_type="char",
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer(tokenizer_folder)


@pytest.fixture
def make_model(tokenizer: TextTokenizer) -> Callable[..., MoleModel]:
    """Makes a small model with weights of its own, the same every time."""

    def make(languages: list[str] = LANGUAGES, **changes: Any) -> MoleModel:
        torch.manual_seed(0)
        return MoleModel(small_config(**changes), languages, tokenizer.vocab_size)

    return make


@pytest.fixture
def batch(tokenizer: TextTokenizer) -> Batch:
    """Four utterances of noise, 0.3 to 1.2 s, in three languages."""
    rng = np.random.default_rng(1)
    examples = [
        Example(
            (0.1 * rng.standard_normal(round(16000 * seconds))).astype(np.float32),
            np.array(tokenizer.encode(text)),
            language,
            row,
            f"u{row}",
            text,
        )
        for row, (seconds, text, language) in enumerate(
            [(0.30, "a", 0), (1.20, "ab cd", 1), (0.725, "d c", 1), (1.2 - 1e-3, "abc", 2)]
        )
    ]
    return collate(examples)


@pytest.fixture(scope="session")
def whisper_model() -> Any:
    """transformers' Whisper, tiny, with random weights; do not change it."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=300,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        pad_token_id=262,
        bos_token_id=262,
        eos_token_id=262,
        decoder_start_token_id=263,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder.embed_positions" not in name:  # biases are zero, and would compare nothing
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def whisper_tokenizer_json() -> str:
    """A byte-level tokenizer with Whisper's special tokens, English and three more languages; 272 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("c", "d"), ("Ġ", "ab"), ("Ġ", "cd"), ("Ġ", "a"), ("d", "c")]
    words = [*letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    languages, tasks = ["en", "de", "fr", "haw"], ["translate", "transcribe", "startofprev", "notimestamps"]
    names = ["endoftext", "startoftranscript", *languages, *tasks]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False, special=True) for name in names])
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory, whisper_model: Any, whisper_tokenizer_json: str) -> Path:
    """The tiny Whisper in Hugging Face's format; do not write there."""
    folder = tmp_path_factory.mktemp("whisper")
    whisper_model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(whisper_tokenizer_json)
    return folder


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic: each letter is 0.2 s of a tone of its own. `NUM_TONES` utterances in two languages, 0.4 to 1.2 s."""
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    utterances = []
    for number in range(NUM_TONES):
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
            "trainer.max_epochs": 2,
            "trainer.num_sanity_val_steps": 0,
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "trainer.log_every_n_steps": 1,
            **{f"model.encoder.{key}": list(v) if isinstance(v, tuple) else v for key, v in SMALL.items()},
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return [f"--{key}={value}" for key, value in keys.items()]

    return words


def build_on_whisper(folder: Path, tokenizer: TextTokenizer, **changes: Any) -> PretrainedModel:
    """A model on a tiny Whisper; `changes` are of its `PretrainedConfig`."""
    torch.manual_seed(0)
    switches = {"checkpoint": str(folder), "num_mole_blocks": 1, "language_tokenizer_block": 1, **changes}
    return from_checkpoint(PretrainedConfig(**switches), LANGUAGES, tokenizer.vocab_size)


def make_experts_differ(model: PretrainedModel, by: float = 0.3) -> None:
    """Adds noise to the experts of the last block, so that the language tells."""
    for n, parameter in enumerate(model.encoder.blocks[-1].feed_forward.moe.experts.parameters()):
        parameter.data += by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n))


def attention_loss(model: PretrainedModel, batch: Batch, smoothing: float = 0.1) -> torch.Tensor:
    """The loss of its attention head."""
    output = model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
    assert model.attention_head is not None and output.memory_BTD is not None
    arguments = output.memory_BTD, output.frames.lengths_B, batch.texts, batch.languages_B
    return model.attention_head.loss(*arguments, smoothing=smoothing)


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


def refused(words: list[str]) -> str:
    """The line with which `fit` refuses these words."""
    with pytest.raises(MoleError) as caught:
        fit(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Of the model that a run has written."""
    return load_model(output / "model")[0].state_dict()


def pad_waves(*waves: np.ndarray) -> tuple[Tensor, Tensor]:
    """Several waveforms as a padded batch, and their lengths."""
    lengths_B = torch.tensor([len(wave) for wave in waves])
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in waves], batch_first=True), lengths_B
