"""The `fit` verb: a recogniser, or, where `data.train_texts` is given, a language model."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from mole_asr.asr.fit import FitResult, find_config

_TEXT_KEY = "train_text"  # start of the key of `data` that says so; recognisers have `train_manifest`


def fit(arguments: list[str]) -> FitResult:
    """Trains a model: `--config conf/asr/prompts5.yaml`, or `--config conf/text/adaptive.yaml`.

    Args:
        arguments: of the command line, behind `fit`; see `mole_asr.asr.fit.fit` and `mole_asr.text.fit.fit`.

    Returns:
        Which utterances were skipped.

    Raises:
        MoleError: the config, the data or the run to resume do not fit.
        KeyboardInterrupt: after Ctrl-C; the same command goes on from the last checkpoint.
    """
    if is_text(arguments):
        from mole_asr.text.fit import fit as fit_text

        fit_text(arguments)
        return FitResult([])
    from mole_asr.asr.fit import fit as fit_speech

    return fit_speech(arguments)


def is_text(arguments: list[str]) -> bool:
    """Whether words of a command line, or the configs that they name, are for a language model."""
    words = [find_config(word) for word in arguments]
    configs = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    configs += [word for option, word in pairwise(words) if option == "--config"]
    return any(word.startswith(f"--data.{_TEXT_KEY}") for word in words) or any(map(_names_texts, configs))


def _names_texts(path: str) -> bool:
    try:
        config: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False  # the command line itself says what is wrong with it
    data = config.get("data") if isinstance(config, dict) else None
    return isinstance(data, dict) and any(str(key).startswith(_TEXT_KEY) for key in data)
