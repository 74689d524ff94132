"""A language model as a folder: model.safetensors, config.json, languages.json, and tokenizer.model of pieces."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from mole_asr.asr.model_files import read_own_config
from mole_asr.errors import MoleError
from mole_asr.files import atomic_path, write_text
from mole_asr.moe.convert.sliced import describe, rebuild
from mole_asr.text.model import NetworkConfig, TextModel
from mole_asr.text.policies import ExpertsConfig
from mole_asr.text.vocabulary import Vocabulary, load_saved_vocabulary

FORMAT = 1


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A trained model and what belongs to it.

    Attributes:
        model: in evaluation mode where it was loaded.
        vocabulary: its ids.
        window: tokens of the windows that it was trained on.
        major_languages: codes that are shown apart.
    """

    model: TextModel
    vocabulary: Vocabulary
    window: int
    major_languages: list[str]


def save_text_model(language_model: LanguageModel, folder: str | Path) -> None:
    """Writes all files; the weights go first and come last, so a folder that has none is not whole."""
    folder, model = Path(folder), language_model.model
    weights = folder / "model.safetensors"
    weights.unlink(missing_ok=True)
    config = {
        "format": FORMAT,
        "vocab_size": model.vocab_size,
        "network": asdict(model.config),
        "experts": [asdict(each) for each in model.experts],
        "window": language_model.window,
        "major_languages": language_model.major_languages,
    }
    config |= describe(model)
    language_model.vocabulary.save(folder)
    write_text(folder / "languages.json", json.dumps(model.languages) + "\n")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    with atomic_path(weights) as temporary:
        save_model(model, str(temporary))  # keeps one copy of a router that layers share


def load_text_model(folder: str | Path, device: str | torch.device = "cpu") -> LanguageModel:
    """Reads a folder that `save_text_model` wrote; the model is in evaluation mode, on `device`.

    Raises:
        MoleError: a file is missing or does not fit the others.
    """
    folder = Path(folder)
    config, languages = read_own_config(folder)
    vocabulary = load_saved_vocabulary(folder)
    try:
        if "network" not in config or config["format"] != FORMAT:
            raise MoleError(f"{folder}: no language model of format {FORMAT}; give a folder made by a text config")
        if vocabulary.size != config["vocab_size"]:
            raise MoleError(
                f"{folder}: the vocabulary has {vocabulary.size} ids, the model {config['vocab_size']}; "
                "use the tokenizer it was trained with"
            )
        network = _dataclass(NetworkConfig, config["network"], folder)
        experts = [_dataclass(ExpertsConfig, each, folder) for each in config["experts"]]
        model = TextModel(network, experts, languages, config["vocab_size"])
        rebuild(model, config, put=lambda dense, layer: layer)
        loaded = LanguageModel(model, vocabulary, int(config["window"]), list(config["major_languages"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MoleError(f"{folder / 'config.json'}: no config of ours ({error!r}); copy the folder anew") from None
    path = folder / "model.safetensors"
    try:
        load_model(model, path)
    except (OSError, SafetensorError) as error:
        raise MoleError(f"{path}: cannot be read ({error}); copy the folder anew") from None
    except RuntimeError as error:
        raise MoleError(f"{path}: does not fit config.json: {' '.join(str(error).split())}") from None
    model.to(device).eval()
    return loaded


_Config = TypeVar("_Config", NetworkConfig, ExpertsConfig)


def _dataclass(kind: type[_Config], values: dict[str, Any], folder: Path) -> _Config:
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise MoleError(f"{folder / 'config.json'}: unknown key {min(unknown)} of {kind.__name__}; update mole_asr")
    return kind(**values)
