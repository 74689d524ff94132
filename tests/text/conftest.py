"""A small language model; everything here is synthetic."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.corpus.text_tokenizer import train_tokenizer
from mole_asr.text.model import NetworkConfig, TextModel
from mole_asr.text.policies import ExpertsConfig

LANGUAGES = ["de", "en", "fr", "ru"]
VOCAB_SIZE = 30
NETWORK: dict[str, Any] = {"d_model": 16, "d_ff": 24, "num_layers": 3, "num_heads": 2}

# Each published system, small.
POLICIES = {
    "dense": ExpertsConfig(),
    "top-1": ExpertsConfig("top_k", num_experts=4, top_k=1),
    "top-2": ExpertsConfig("top_k", num_experts=4, top_k=2),
    "noisy": ExpertsConfig("noisy_top_k", num_experts=4, top_k=2),
    "adaptive": ExpertsConfig("adaptive", num_experts=4, threshold=0.1),
    "post-moe": ExpertsConfig("forced", layers="last 2", top_k=2),
    "families": ExpertsConfig("forced", layers=[1], top_k=2, expert_of="family"),
    "shared": ExpertsConfig("top_k", num_experts=4, top_k=1, shared_expert=True),
    "omni": ExpertsConfig("top_k", num_experts=4, top_k=2, share_router=True),
}


@pytest.fixture
def make_model() -> Callable[..., TextModel]:
    """Makes a small model with weights of its own, the same every time, in float64 and in evaluation mode."""

    def make(
        experts: ExpertsConfig | None = None,
        vocab_size: int = VOCAB_SIZE,
        more: Sequence[ExpertsConfig] = (),
        **changes: Any,
    ) -> TextModel:
        torch.manual_seed(0)
        network = NetworkConfig(**{**NETWORK, **changes})
        return TextModel(network, [experts or ExpertsConfig(), *more], LANGUAGES, vocab_size).double().eval()

    return make


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))


WORDS = {
    "de": ["der", "hund", "läuft", "schnell", "und", "die"],
    "en": ["the", "dog", "runs", "fast", "and", "a"],
    "ru": ["собака", "бежит", "быстро", "и"],
}


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic: sentences of a few words in three languages of unequal size."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = []
    for language, count in (("de", 14), ("en", 40), ("ru", 6)):
        for number in range(count):
            text = " ".join(rng.choices(WORDS[language], k=rng.randint(1, 6)))
            lines.append({"text": text, "language": language, "source": "made", "id": f"{language}{number}"})
    rng.shuffle(lines)
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece tokenizer with byte fallback."""
    folder = _trained_on(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer(folder / "texts.jsonl", folder, vocab_size=300, model_type="bpe")
    return folder


@pytest.fixture(scope="session")
def letters_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single letters, those of the texts alone."""
    folder = _trained_on(tmp_path_factory.mktemp("letters"))
    train_tokenizer(folder / "texts.jsonl", folder, model_type="char", byte_fallback=False)
    return folder


def _trained_on(folder: Path) -> Path:
    texts = ["the dog runs fast and a dog", "der hund läuft schnell und die und der"]
    write_manifest(
        (
            Utterance(f"t{i}", folder / "none.wav", 0.0, 1.0, 16000, text, "en", num_samples=16000)
            for i, text in enumerate(texts)
        ),
        folder / "texts.jsonl",
    )
    return folder
