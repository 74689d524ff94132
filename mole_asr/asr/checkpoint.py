"""A trained model as a folder: tensors and JSON only, nothing pickled.

model.safetensors, config.json (sizes and switches), languages.json (codes, in the order of the experts),
tokenizer.model; where they were heard, examples of the languages (`replay.py`); and, of a model that stands on Whisper,
Whisper's tokenizer.json.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mole_asr.asr.familiarity import remember
from mole_asr.asr.generations import Generation, keep_languages, set_generations
from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.asr.model_files import read_own_config
from mole_asr.asr.pretrained import ENCODERS, EncoderSizes, PretrainedConfig, PretrainedModel
from mole_asr.asr.replay import load_examples, save_examples
from mole_asr.asr.whisper_tokenizer import WhisperTokenizer
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError
from mole_asr.files import atomic_path, write_text
from mole_asr.moe.convert.sliced import describe, rebuild

FORMAT = 1
Recogniser: TypeAlias = MoleModel | PretrainedModel


def save_model(
    model: Recogniser, tokenizer: TextTokenizer, folder: str | Path, examples: Mapping[str, Tensor] | None = None
) -> None:
    """Writes all files; the weights go first and come last, so a folder that has none is not whole.

    Args:
        model: a recogniser.
        tokenizer: its text tokenizer.
        folder: to write; examples of a model that was there before go.
        examples: what was heard of each language (`replay.py`), if anything was.
    """
    folder = Path(folder)
    weights = folder / "model.safetensors"
    weights.unlink(missing_ok=True)
    config: dict[str, Any] = {"format": FORMAT, "vocab_size": model.vocab_size}
    if isinstance(model, PretrainedModel):
        config |= {"pretrained": asdict(model.config), model.kind: asdict(model.sizes)}
        if model.whisper_tokenizer is not None:
            model.whisper_tokenizer.save(folder)
    else:
        config["encoder"] = asdict(model.config)
    if model.mixture.generations:
        config["generations"] = model.mixture.generations
    if model.mixture.kept is not None:
        config["heard"] = model.mixture.languages
    config |= describe(model)
    tokenizer.save(folder)
    write_text(folder / "languages.json", json.dumps(model.languages) + "\n")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    save_examples(examples or {}, folder)
    with atomic_path(weights) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> tuple[Recogniser, TextTokenizer]:
    """Reads a folder that `save_model` wrote; the model is in evaluation mode, on `device`.

    Raises:
        MoleError: a file is missing or does not fit the others.
    """
    folder = Path(folder)
    config, languages = read_own_config(folder)
    if "network" in config:
        raise MoleError(f"{folder}: holds a language model, not a recogniser; give the folder of one")
    tokenizer = TextTokenizer(folder)
    try:
        model = _build(config, config.get("heard", languages), tokenizer, folder)
        if "generations" in config:
            set_generations(model, [Generation(*counts) for counts in config["generations"]])
        if "heard" in config:
            keep_languages(model, languages)
        rebuild(model, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MoleError(f"{folder / 'config.json'}: no config of ours ({error!r}); copy the folder anew") from None
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise MoleError(f"{path}: cannot be read ({error}); copy the folder anew") from None
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise MoleError(f"{path}: does not fit config.json ({first} ...); train the model anew") from None
    # The examples of a model in slices are those of the dense one: its hidden vectors are others.
    if model.attention_head is not None and not describe(model):
        remember(model, load_examples(folder, model))
    return model.to(device).eval(), tokenizer


def _build(config: Any, languages: Any, tokenizer: TextTokenizer, folder: Path) -> Recogniser:
    """A model without weights; files that lack something raise whatever error that gives."""
    if config.get("format") != FORMAT:
        raise MoleError(
            f"{folder / 'config.json'}: format {config.get('format')} is not {FORMAT}; train the model anew"
        )
    if tokenizer.vocab_size != config["vocab_size"]:
        raise MoleError(
            f"{folder}: tokenizer.model has {tokenizer.vocab_size} pieces, the model {config['vocab_size']}; "
            "use the tokenizer it was trained with"
        )
    if "pretrained" in config:
        kind = next((kind for kind in ENCODERS if kind in config), "whisper")
        return PretrainedModel(
            _dataclass(PretrainedConfig, config["pretrained"], folder),
            _dataclass(ENCODERS[kind][0], config[kind], folder),
            WhisperTokenizer(folder) if kind == "whisper" else None,
            languages,
            config["vocab_size"],
        )
    return MoleModel(_dataclass(EncoderConfig, config["encoder"], folder), languages, config["vocab_size"])


_Config = TypeVar("_Config", bound=EncoderConfig | PretrainedConfig | EncoderSizes)


def _dataclass(kind: type[_Config], values: dict[str, Any], folder: Path) -> _Config:
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise MoleError(f"{folder / 'config.json'}: unknown key {min(unknown)} of {kind.__name__}; update mole_asr")
    # JSON has no tuples.
    arguments: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return kind(**arguments)
    except MoleError as error:
        raise MoleError(f"{folder / 'config.json'}: {error}") from None
