"""Finds and reads the files of pretrained models: folders in Hugging Face's format, or names on its hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mole_asr.errors import MoleError

Tensors = dict[str, Tensor]
CONFIG = "config.json"
_INDEX = ".index.json"  # lists the shards of large weights
WEIGHTS = ("model.safetensors", "model.safetensors" + _INDEX, "pytorch_model.bin", "pytorch_model.bin" + _INDEX)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find_model(path_or_hub_id: str | Path, needed: Sequence[str], weights: Sequence[str] = WEIGHTS) -> Path:
    """The path of a model: a local one, or the folder that its files on the hub were fetched to.

    Args:
        path_or_hub_id: a path, or "owner/name" on the Hugging Face hub.
        needed: files to fetch from the hub.
        weights: names that weights may have there; the first that the hub has is fetched.

    Raises:
        MoleError: there is no such path, and no such model can be fetched.
    """
    path, name = Path(path_or_hub_id), str(path_or_hub_id)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(name):
        raise MoleError(f"{name}: no such model; give its folder or file, or owner/name on the Hugging Face hub")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MoleError(
            f"{name}: no such folder, and the hub needs huggingface_hub; pip install 'mole-asr[whisper]'"
        ) from None
    try:
        for file in needed:
            folder = Path(hf_hub_download(name, file)).parent
        for file in weights:
            try:
                path = Path(hf_hub_download(name, file))
            except LocalEntryNotFoundError:  # the hub cannot be asked
                raise
            except EntryNotFoundError:  # it may be there under another name
                continue
            for shard in _shards(path) if file.endswith(_INDEX) else ():
                hf_hub_download(name, shard)
            return folder
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise MoleError(f"{name}: no such folder, and the hub does not give it ({first_line(error)})") from None
    raise MoleError(f"{name}: the hub has no weights for it; one of {', '.join(weights)} must be there")


def read_json(path: Path, todo: str = "give the folder of a whole model", kind: type = dict) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        todo: where it is missing.
        kind: dict, or list.

    Raises:
        MoleError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoleError(f"{path}: cannot be read ({error.strerror}); {todo}") from None
    except ValueError as error:
        raise MoleError(f"{path}: not JSON ({error}); copy the model anew") from None
    if not isinstance(value, kind):
        raise MoleError(f"{path}: holds no {'object' if kind is dict else 'list'}; copy the model anew")
    return value


def read_own_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The config and the languages of a model that `fit` has written.

    Raises:
        MoleError: one of the files cannot be read.
    """
    todo = "give the model folder that `mole-asr fit` wrote"
    return read_json(folder / CONFIG, todo), read_json(folder / "languages.json", todo, list)


def read_weights(folder: Path) -> Tensors:
    """The tensors of a folder in Hugging Face's format, whole or in shards.

    Raises:
        MoleError: there are none, or they cannot be read.
    """
    for name in WEIGHTS:
        path = folder / name
        if path.exists():
            files = [folder / shard for shard in _shards(path)] if name.endswith(_INDEX) else [path]
            return {key: value for file in files for key, value in read_tensors(file).items()}
    raise MoleError(f"{folder}: no weights; one of {', '.join(WEIGHTS)} must be there")


def read_tensors(path: Path) -> Any:
    """What a safetensors file or a pickle of tensors holds; code in a pickle is not run.

    Raises:
        MoleError: it cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MoleError(f"{path}: no such file; copy the model anew") from None
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise MoleError(f"{path}: cannot be read as weights ({first_line(error)}); copy the model anew") from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0]


def _shards(index: Path) -> list[str]:
    return sorted(set(read_json(index).get("weight_map", {}).values()))
