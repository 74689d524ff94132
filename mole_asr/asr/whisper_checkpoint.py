"""Loads Whisper's checkpoints, as Hugging Face, OpenAI or CTranslate2 writes them, for our own modules."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mole_asr.asr.ctranslate2_file import read_ctranslate2
from mole_asr.asr.model_files import CONFIG, WEIGHTS, Tensors, find_model, read_json, read_tensors, read_weights
from mole_asr.asr.whisper import WhisperConfig, WhisperEncoder
from mole_asr.asr.whisper_decoder import WhisperDecoder
from mole_asr.asr.whisper_layouts import CTRANSLATE2, HUGGING_FACE, OPENAI, Layout, convert
from mole_asr.asr.whisper_tokenizer import FILE_NAME, WhisperTokenizer
from mole_asr.errors import MoleError

_CTRANSLATE2 = "model.bin"
_HUGGING_FACE_KEYS = {
    "num_mels": "num_mel_bins",
    "d_model": "d_model",
    "d_ff": "encoder_ffn_dim",
    "encoder_layers": "encoder_layers",
    "encoder_heads": "encoder_attention_heads",
    "decoder_layers": "decoder_layers",
    "decoder_heads": "decoder_attention_heads",
    "vocab_size": "vocab_size",
    "max_frames": "max_source_positions",
    "max_tokens": "max_target_positions",
}
_OPENAI_KEYS = {
    "num_mels": "n_mels",
    "d_model": "n_audio_state",
    "encoder_layers": "n_audio_layer",
    "encoder_heads": "n_audio_head",
    "decoder_layers": "n_text_layer",
    "decoder_heads": "n_text_head",
    "vocab_size": "n_vocab",
    "max_frames": "n_audio_ctx",
    "max_tokens": "n_text_ctx",
}


class WhisperCheckpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        config: sizes.
        encoder: state of a `WhisperEncoder`, float32.
        decoder: state of a `WhisperDecoder`, float32.
        tokenizer: its text tokenizer.
    """

    config: WhisperConfig
    encoder: Tensors
    decoder: Tensors
    tokenizer: WhisperTokenizer


def load_whisper(path_or_hub_id: str | Path) -> WhisperCheckpoint:
    """Loads a checkpoint.

    Args:
        path_or_hub_id: a folder in Hugging Face's format (config.json, tokenizer.json, and weights as safetensors or
            as pytorch_model.bin, whole or in shards); a folder in CTranslate2's (model.bin, tokenizer.json); OpenAI's
            file (.pt) with a tokenizer.json beside it; or "owner/name" of a model on the Hugging Face hub.

    Raises:
        MoleError: nothing is there, or it is no whole Whisper model that we know how to run.
    """
    path = find_model(path_or_hub_id, (CONFIG, FILE_NAME), (*WEIGHTS, _CTRANSLATE2))
    if path.is_file():
        weights, (config, tensors, layout) = path, _read_openai(path)
    elif (path / _CTRANSLATE2).exists():
        weights = path / _CTRANSLATE2
        config, tensors, layout = _read_ctranslate2(weights)
    else:
        weights, (config, tensors, layout) = path, _read_hugging_face(path)
    tokenizer = (path if path.is_dir() else path.parent) / FILE_NAME
    if not tokenizer.exists():
        raise MoleError(f"{tokenizer}: no such file; copy it from the model's page on the Hugging Face hub")
    for kind, heads in (("encoder", config.encoder_heads), ("decoder", config.decoder_heads)):
        if heads < 1 or config.d_model % heads:
            raise MoleError(
                f"{weights}: {heads} heads of the {kind} do not part its width, {config.d_model}; copy the model anew"
            )
    try:
        encoder, decoder = convert(tensors, layout, config.encoder_layers, config.decoder_layers)
        _check_shapes(config, encoder, decoder, weights)
    except KeyError as error:
        raise MoleError(f"{weights}: tensor {error.args[0]} is missing; copy the model anew") from None
    return WhisperCheckpoint(config, encoder, decoder, WhisperTokenizer(tokenizer))


def _check_shapes(config: WhisperConfig, encoder: Tensors, decoder: Tensors, path: Path) -> None:
    for kind, module_type, state in (("encoder", WhisperEncoder, encoder), ("decoder", WhisperDecoder, decoder)):
        with torch.device("meta"):
            module: nn.Module = module_type(config)
        for name, expected in module.state_dict().items():
            if state[name].shape != expected.shape:
                found = tuple(state[name].shape)
                raise MoleError(f"{path}: {kind} {name} is {found}, not {tuple(expected.shape)} as its sizes say")


def _sizes(values: Mapping[str, Any], keys: Mapping[str, str], path: Path) -> dict[str, int]:
    """The values of a file by our names for them.

    Raises:
        MoleError: one is missing, or no size.
    """
    for key in keys.values():
        if key not in values:
            raise MoleError(f"{path}: key {key} is missing; copy the model anew")
        if not isinstance(values[key], int) or values[key] < 1:
            raise MoleError(f"{path}: {key} is {values[key]!r}, no size; copy the model anew")
    return {name: values[key] for name, key in keys.items()}


def _read_hugging_face(folder: Path) -> tuple[WhisperConfig, Tensors, Layout]:
    path = folder / CONFIG
    values = read_json(path)
    if values.get("model_type") != "whisper":
        raise MoleError(f"{path}: model_type {values.get('model_type')!r} is not 'whisper'; give a Whisper model")
    if values.get("activation_function", "gelu") != "gelu" or values.get("scale_embedding", False):
        raise MoleError(f"{path}: only GELU and unscaled embeddings are supported; give an unchanged Whisper model")
    config = WhisperConfig(**_sizes(values, _HUGGING_FACE_KEYS, path))
    tensors = read_weights(folder)
    return config, {name.removeprefix("model."): value for name, value in tensors.items()}, HUGGING_FACE


def _read_openai(path: Path) -> tuple[WhisperConfig, Tensors, Layout]:
    values = read_tensors(path)
    try:
        dims, tensors = values["dims"], values["model_state_dict"]
        sizes = _sizes(dims, _OPENAI_KEYS, path)
        config = WhisperConfig(d_ff=4 * sizes["d_model"], **sizes)
    except (KeyError, TypeError, IndexError) as error:
        raise MoleError(f"{path}: not OpenAI's file of a Whisper model ({error!r}); give another") from None
    return config, tensors, OPENAI


def _read_ctranslate2(path: Path) -> tuple[WhisperConfig, Tensors, Layout]:
    tensors = {
        re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name.replace("/", "."))): value
        for name, value in read_ctranslate2(path, "WhisperSpec").items()
    }
    layers = {
        kind: len({match[1] for name in tensors if (match := re.match(rf"{kind}\.layer_(\d+)\.", name))})
        for kind in ("encoder", "decoder")
    }
    try:
        num_frames, d_model = tensors[CTRANSLATE2.encoder_positions].shape
        config = WhisperConfig(
            num_mels=tensors["encoder.conv1.weight"].shape[1],
            d_model=d_model,
            d_ff=len(tensors["encoder.layer_0.ffn.linear_0.weight"]),
            encoder_layers=layers["encoder"],
            encoder_heads=int(tensors["encoder.num_heads"]),
            decoder_layers=layers["decoder"],
            decoder_heads=int(tensors["decoder.num_heads"]),
            vocab_size=len(tensors[CTRANSLATE2.embedding]),
            max_frames=num_frames,
            max_tokens=len(tensors[CTRANSLATE2.decoder_positions]),
        )
    except (KeyError, ValueError) as error:
        raise MoleError(f"{path}: not a whole Whisper model ({error!r}); convert it anew") from None
    return config, tensors, CTRANSLATE2
