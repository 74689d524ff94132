"""A small model, a character tokenizer, and a batch of noise: everything here is synthetic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.corpus.batch import Batch, Example, collate
from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer, train_tokenizer

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
