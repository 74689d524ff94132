"""One training, resumable, with the time that it took in all."""

import json
import shutil
import time
from pathlib import Path

import numpy as np

from mole_asr.asr.fit import fit
from mole_asr.errors import MoleError
from mole_asr.files import write_text
from mole_asr.score.charts import read_curves


def train(folder: Path, words: list[str], languages: list[str]) -> float:
    """Trains a model into `folder`/model, or goes on, or does nothing where it is done.

    Args:
        folder: of the run.
        words: for `mole-asr fit`, but the folder and the languages.
        languages: codes that the model learns.

    Returns:
        Seconds of the training, those of interrupted attempts included.

    Raises:
        MoleError: the folder holds a run of another configuration.
    """
    notes, settings = folder / "training.json", _settings(words)
    state = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {"seconds": 0.0, "done": False}
    if state.setdefault("settings", settings) != settings:
        raise MoleError(f"{folder} was trained with another configuration: remove it, or give another --runs")
    if state["done"] and (folder / "model" / "model.safetensors").exists():
        return state["seconds"]
    if state["done"]:  # somebody removed the model
        state |= {"seconds": 0.0, "done": False}
    start, before = time.monotonic(), state["seconds"]
    try:
        fit([*words, f"--output={folder}", f"--data.languages={json.dumps(languages)}"])
        state["done"] = True
    finally:
        state["seconds"] = before + time.monotonic() - start
        write_text(notes, json.dumps(state, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return state["seconds"]


def gradient_norms(folder: Path) -> dict[str, list[float]]:
    """Norms of the gradients of each expert that a training logged: name -> means of each tenth of the training."""
    if not any(folder.rglob("metrics.csv")):
        return {}
    curves = read_curves(folder, ("gradient/",))
    tenths = {name: np.array_split([value for _, value in points], 10) for name, points in curves.items()}
    return {
        name.removeprefix("gradient/"): [float(f"{part.mean():.3g}") for part in parts if len(part)]
        for name, parts in tenths.items()
    }


def _settings(words: list[str]) -> list[str]:
    """What decides about the outcome: the keys given, and the lines of the configs without comments."""
    settings = []
    for word in words:
        name, _, value = word.partition("=")
        if name == "--config":
            lines = Path(value).read_text(encoding="utf-8").splitlines()
            settings += [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        elif "manifest" not in name and "tokenizer" not in name:
            settings.append(word)
    return settings
