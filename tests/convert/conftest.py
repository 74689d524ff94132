"""Small models of all kinds with weights of their own, and synthetic data for them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mole_asr.asr.checkpoint import save_model
from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.asr.pretrained import PretrainedConfig, PretrainedModel
from mole_asr.asr.w2v_bert import W2vBertConfig
from mole_asr.asr.wav2vec2 import Wav2Vec2Config
from mole_asr.asr.whisper import WhisperConfig
from mole_asr.asr.whisper_tokenizer import WhisperTokenizer
from mole_asr.convert.host import Host, open_host
from mole_asr.convert.slicing import Cut, slice_parts
from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer, train_tokenizer
from mole_asr.text.checkpoint import LanguageModel, save_text_model
from mole_asr.text.model import NetworkConfig, TextModel
from mole_asr.text.policies import ExpertsConfig
from mole_asr.text.vocabulary import load_vocabulary

WORDS = ["the", "dog", "runs", "fast", "and", "a", "cat", "sleeps"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of a few words, of two languages by name."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": " ".join(rng.choices(WORDS, k=6)), "language": rng.choice(["de", "en"])} for _ in range(120)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture
def text_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a small language model."""

    def make(
        name: str = "text",
        vocabulary: str | Path = "bytes",
        experts: ExpertsConfig = ExpertsConfig(),  # noqa: B008 (frozen)
        **changes: Any,
    ) -> Path:
        torch.manual_seed(0)
        known = load_vocabulary(vocabulary)
        network = NetworkConfig(**{"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, **changes})
        model = TextModel(network, [experts], ["de", "en"], known.size).eval()
        save_text_model(LanguageModel(model, known, 32, ["en"]), tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cuts.jsonl`, noise of different lengths, and `model/`, an untrained recogniser."""
    folder = tmp_path_factory.mktemp("speech")
    rng, utterances = np.random.default_rng(0), []
    for number in range(6):
        path, samples = folder / f"{number}.wav", 16000 + 4000 * number
        soundfile.write(path, 0.1 * rng.standard_normal(samples), 16000)
        code = "de" if number % 2 else "en"
        utterances.append(Utterance(str(number), path, 0.0, samples / 16000, 16000, "abba", code, num_samples=samples))
    write_manifest(utterances, folder / "cuts.jsonl")
    train_tokenizer(folder / "cuts.jsonl", folder / "tokenizer", 20, byte_fallback=False, model_type="char")
    tokenizer = TextTokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    config = EncoderConfig(
        d_model=16,
        d_ff=32,
        num_blocks=2,
        num_mole_blocks=1,
        language_tokenizer_block=1,
        num_heads=2,
        kernel_size=5,
        num_mels=20,
        intermediate_ctc_blocks=(1,),
    )
    save_model(MoleModel(config, ["de", "en"], tokenizer.vocab_size).eval(), tokenizer, folder / "model")
    return folder


def whisper_tokenizer() -> WhisperTokenizer:
    """Knows no text, only the signs that a multilingual one has."""
    from tokenizers import AddedToken, Tokenizer, models

    tokenizer = Tokenizer(models.BPE({}, []))
    names = ["endoftext", "startoftranscript", "de", "en", "transcribe", "notimestamps"]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False, special=True) for name in names])
    return WhisperTokenizer.from_text(tokenizer.to_str())


@pytest.fixture
def pretrained_folder(speech: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes the folder of an untrained recogniser on an encoder of another kind."""
    sizes: dict[str, WhisperConfig | Wav2Vec2Config | W2vBertConfig] = {
        "whisper": WhisperConfig(80, 16, 32, 3, 2, 1, 2, 10),  # a dense block lies above the language tokenizer
        "wav2vec2": Wav2Vec2Config(
            (8, 8, 8), (10, 8, 4), (5, 8, 8), False, True, 16, 32, 2, 2, 8, 2, norm_first=False, waveform_eps=1e-7
        ),
        "w2v_bert": W2vBertConfig(80, 16, 32, 2, 2, 5, 8, 4),
    }

    def make(name: str) -> Path:
        torch.manual_seed(0)
        tokenizer = TextTokenizer(speech / "tokenizer")
        config = PretrainedConfig(num_mole_blocks=1, language_tokenizer_block=1)
        whispers = whisper_tokenizer() if name == "whisper" else None
        model = PretrainedModel(config, sizes[name], whispers, ["de", "en"], tokenizer.vocab_size).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        save_model(model, tokenizer, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tokenizer whose pieces are mostly whole words."""
    folder = tmp_path_factory.mktemp("pieces")
    spoken = Utterance("0", folder / "none.wav", 0.0, 1.0, 16000, " ".join(WORDS), "en", num_samples=16000)
    write_manifest([spoken], folder / "cuts.jsonl")
    train_tokenizer(folder / "cuts.jsonl", folder / "tokenizer", 40, byte_fallback=False, model_type="bpe")
    return folder / "tokenizer"


def huggingface_model(style: str) -> Any:
    """A tiny model of transformers with random weights, biases too."""
    transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install mole-asr[dev]")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 48}
    t5 = {"vocab_size": 60, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    model = {
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "llama-bias": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, num_key_value_heads=2, mlp_bias=True)
        ),
        "bitnet": lambda: transformers.BitNetForCausalLM(
            transformers.BitNetConfig(**sizes, num_key_value_heads=2, hidden_act="silu")
        ),
        "electra": lambda: transformers.ElectraForPreTraining(transformers.ElectraConfig(**sizes, embedding_size=16)),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes)),
        "bert-base": lambda: transformers.BertModel(transformers.BertConfig(**sizes)),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**t5, feed_forward_proj="relu", decoder_start_token_id=0)
        ),
        "t5-gated": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                **t5, feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False
            )
        ),
    }[style]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def huggingface_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a tiny Hugging Face model, with a tokenizer of words."""

    def make(style: str, dtype: torch.dtype = torch.float32) -> Path:
        model = huggingface_model(style).to(dtype)
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        folder = tmp_path / style
        model.save_pretrained(folder)
        known = {word: number for number, word in enumerate(["[UNK]", "[MASK]", "\n", *WORDS])}
        words = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", mask_token="[MASK]").save_pretrained(folder)
        return folder

    return make


def sliced_host(folder: Path, cut: Cut, data: str | None = None) -> tuple[Host, dict[str, Any]]:
    host = open_host(folder)
    parts = host.parts()
    rows = None if data is None else host.record(host.read(data, 300, 0))
    for name, layer in slice_parts(parts, cut, rows).items():
        host.put(name, layer)
    return host, parts
