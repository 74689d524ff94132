"""A small decoder that spells with a recogniser's pieces, and what it says of a text when nothing is kept."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mole_asr.corpus.text_tokenizer import TextTokenizer, train_tokenizer
from mole_asr.text.checkpoint import LanguageModel
from mole_asr.text.model import NetworkConfig, TextModel
from mole_asr.text.policies import ExpertsConfig
from mole_asr.text.vocabulary import PieceVocabulary, Vocabulary

Make = Callable[..., LanguageModel]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Nine ids: blank, unknown, the space, a to f."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "texts.jsonl").write_text('{"text": "abc def fed cab", "language": "en"}\n' * 3)
    return train_tokenizer(folder / "texts.jsonl", folder, vocab_size=20, byte_fallback=False, model_type="char")


@pytest.fixture
def make_lm(tokenizer: TextTokenizer) -> Make:
    """Makes a decoder with weights of its own, in float64."""

    def make(
        vocabulary: Vocabulary | None = None, experts: ExpertsConfig | None = None, window: int = 64, layers: int = 2
    ) -> LanguageModel:
        vocabulary = vocabulary or PieceVocabulary(tokenizer)
        torch.manual_seed(0)
        network = NetworkConfig(d_model=16, d_ff=24, num_layers=layers, num_heads=2)
        model = TextModel(network, [experts or ExpertsConfig()], ["en", "fr"], vocabulary.size).double().eval()
        with torch.no_grad():
            model.norm.weight.normal_()  # else a token mostly expects itself again
        return LanguageModel(model, vocabulary, window, [])

    return make


@torch.no_grad()
def slow_log_probs(lm: LanguageModel, ids: list[int]) -> np.ndarray:
    """float64 [V], natural logarithms of what follows these ids, all of them computed anew, no batch and no cache."""
    return lm.model(torch.tensor([ids])).logits_BTV[0, -1].log_softmax(-1).numpy()


def slow_score(lm: LanguageModel, ids: list[int]) -> float:
    """Logarithm of the probability of a whole text, its end included, step by step."""
    whole = [lm.vocabulary.separator, *ids, lm.vocabulary.separator]
    return sum(float(slow_log_probs(lm, whole[:n])[whole[n]]) for n in range(1, len(whole)))


def random_log_probs(frames: int, vocab: int, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(frames, vocab)) * 2
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))
