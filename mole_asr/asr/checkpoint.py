"""A trained model as a folder: tensors and JSON only, nothing pickled.

model.safetensors, config.json (sizes and switches), languages.json (codes, in the order of the experts),
tokenizer.model.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mole_asr.asr.model import EncoderConfig, MoleModel
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError
from mole_asr.files import atomic_path, write_text

FORMAT = 1


def save_model(model: MoleModel, tokenizer: TextTokenizer, folder: str | Path) -> None:
    """Writes the four files; the weights come last, so a folder that has none is not whole."""
    folder = Path(folder)
    config = {"format": FORMAT, "vocab_size": model.vocab_size, "encoder": asdict(model.config)}
    tokenizer.save(folder)
    write_text(folder / "languages.json", json.dumps(model.languages) + "\n")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> tuple[MoleModel, TextTokenizer]:
    """Reads a folder that `save_model` wrote; the model is in evaluation mode, on `device`.

    Raises:
        MoleError: a file is missing or does not fit the others.
    """
    folder = Path(folder)
    config, languages = _read_json(folder / "config.json"), _read_json(folder / "languages.json")
    tokenizer = TextTokenizer(folder)
    try:
        model = _build(config, languages, tokenizer, folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MoleError(f"{folder / 'config.json'}: no config of ours ({error!r}); copy the folder anew") from None
    path = folder / "model.safetensors"
    try:
        model.load_state_dict({_moved(name): tensor for name, tensor in load_file(path).items()})
    except (OSError, SafetensorError) as error:
        raise MoleError(f"{path}: cannot be read ({error}); copy the folder anew") from None
    except RuntimeError as error:
        raise MoleError(f"{path}: does not fit config.json: {' '.join(str(error).split())}") from None
    return model.to(device).eval(), tokenizer


def _build(config: Any, languages: Any, tokenizer: TextTokenizer, folder: Path) -> MoleModel:
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
    return MoleModel(_encoder_config(config["encoder"], folder), languages, config["vocab_size"])


def _moved(name: str) -> str:
    """Where a tensor lies now: models of the first release had the language tokenizer beside the blocks."""
    return f"mixture.{name}" if name.startswith("language_tokenizer.") else name


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise MoleError(f"{path}: no such file; give the model folder that `mole-asr fit` wrote") from None
    except ValueError as error:
        raise MoleError(f"{path}: not JSON ({error}); copy the folder anew") from None


def _encoder_config(values: dict[str, Any], folder: Path) -> EncoderConfig:
    unknown = set(values) - {field.name for field in fields(EncoderConfig)}
    if unknown:
        raise MoleError(f"{folder / 'config.json'}: unknown key encoder.{min(unknown)}; update mole_asr")
    # JSON has no tuples.
    arguments: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return EncoderConfig(**arguments)
