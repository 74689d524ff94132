"""What a training logged."""

from pathlib import Path

import numpy as np

from mole_asr.score.charts import read_curves


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
