"""The figures of a trained language model as plain values: what the recipes on texts keep in their results.json."""

from pathlib import Path
from typing import Any

import numpy as np

from mole_asr.score.charts import read_curves
from mole_asr.text.checkpoint import LanguageModel
from mole_asr.text.cost import token_cost
from mole_asr.text.evaluate import Evaluation
from mole_asr.text.figures import major_and_minor

_CLOCKS = {"seconds": "train/seconds", "cpu_seconds": "train/cpu_seconds"}


def quality(language_model: LanguageModel, found: Evaluation) -> dict[str, Any]:
    """What a model is worth and what a token costs.

    Returns:
        `bits_per_byte`, `major` and `minor`: means over languages; `bits`: of each; `layers`: figures of each layer of
        experts, in their order; `total_parameters`, `active_parameters`, `flops` and `feed_forward_flops` a token.
    """
    means = major_and_minor(found.bits, language_model.major_languages)
    per_token = {layer: figures.experts_per_token for layer, figures in found.layers.items()}
    cost = token_cost(language_model.model, language_model.window, per_token)
    return {
        "bits_per_byte": _rounded(means["all"]),
        "major": _rounded(means.get("major")),
        "minor": _rounded(means.get("minor")),
        "bits": {code: _rounded(value) for code, value in found.bits.items()},
        "layers": [
            {"layer": layer, **{name: _rounded(value) for name, value in vars(figures).items()}}
            for layer, figures in found.layers.items()
        ],
        "total_parameters": cost.total_parameters,
        "active_parameters": round(cost.active_parameters),
        "flops": round(cost.flops),
        "feed_forward_flops": round(cost.feed_forward_flops),
    }


def training(folder: Path, language_model: LanguageModel, found: Evaluation, tokens: int) -> dict[str, Any]:
    """What a training logged; it needs `timing.StepClock` among the trainer's callbacks.

    Args:
        folder: of the run.
        language_model: that came out of it.
        found: what it did on texts; adaptive gating is counted by what it did in the training.
        tokens: of a step.

    Returns:
        `curve`: at each validation its step, bits a byte, seconds by the wall, seconds of the CPU and FLOPs so far
        (three times those of a forward); `shares`: of adaptive gating, at each logged step its step and the share of
        two-expert tokens of each layer; `seconds` and `cpu_seconds` of all steps.
    """
    curves = read_curves(folder, ("train/", "valid/"))
    clocks = {name: np.array(curves[key]).T for name, key in _CLOCKS.items()}
    layers = sorted((name for name in curves if name.startswith("train/several_share_")), key=_place)
    shares = [
        [points[0][0], *(_rounded(value) for _, value in points)]
        for points in zip(*(curves[name] for name in layers), strict=True)
    ]
    curve = []
    for step, bits in curves["valid/bits_per_byte"]:
        per_token = {layer: figures.experts_per_token for layer, figures in found.layers.items()}
        so_far = [each[1:] for each in shares if each[0] <= step]
        if so_far:
            per_token = {_place(name): 1 + mean for name, mean in zip(layers, np.mean(so_far, axis=0), strict=True)}
        flops = 3 * tokens * (step + 1) * token_cost(language_model.model, language_model.window, per_token).flops
        seconds = (round(float(np.interp(step, *clock)), 2) for clock in clocks.values())
        curve.append([step, _rounded(bits), *seconds, round(flops)])
    return {"curve": curve, "shares": shares} | {name: round(clock[1][-1], 1) for name, clock in clocks.items()}


def _place(name: str) -> int:
    return int(name.rpartition("_")[2])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 5)
