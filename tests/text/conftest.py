"""A small language model; everything here is synthetic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

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
    "adaptive": ExpertsConfig("adaptive", num_experts=4, threshold=0.1),
    "post-moe": ExpertsConfig("forced", layers="last 2", top_k=2),
    "families": ExpertsConfig("forced", layers=[1], top_k=2, expert_of="family"),
}


@pytest.fixture
def make_model() -> Callable[..., TextModel]:
    """Makes a small model with weights of its own, the same every time, in float64 and in evaluation mode."""

    def make(experts: ExpertsConfig | None = None, vocab_size: int = VOCAB_SIZE, **changes: Any) -> TextModel:
        torch.manual_seed(0)
        network = NetworkConfig(**{**NETWORK, **changes})
        return TextModel(network, experts or ExpertsConfig(), LANGUAGES, vocab_size).double().eval()

    return make


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))
