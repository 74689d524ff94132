"""What the recipes measure of one host in many cuts: a row each, in which quality and speed come from one run.

Letters: N rows, E slices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole_asr.bench.timing import quiet, time_in_turn
from mole_asr.convert.host import DensePart, Host, Quality, hidden_activations
from mole_asr.convert.slicing import Cut, output_error, slice_parts
from mole_asr.convert.speed import measure_speed
from mole_asr.convert.training import imitate
from mole_asr.errors import MoleError
from mole_asr.moe.convert.fitting import mass_kept
from mole_asr.moe.convert.sliced import RouterKind, SlicedLayer
from mole_asr.moe.convert.splits import Split
from mole_asr.moe.routers import MLPRouter
from mole_asr.score.results import Row

_COMPARED_ROWS = 4096


@dataclass(eq=False)
class Bench:
    """A dense host, and what all cuts of it are measured on.

    Attributes:
        host: dense; it stays as it is.
        rows: what its parts get of the training data, to cut and fit by.
        tests: batches of test data.
        heard: what its parts get of those.
        repeat: rounds of each timing.
        parts: the dense parts.
        dense: quality of the dense host.
        largest: the batch of test data by which the whole model is timed.
    """

    host: Host
    rows: Mapping[str, Tensor]
    tests: Sequence[Any]
    repeat: int = 5
    heard: dict[str, Tensor] = field(init=False)
    parts: dict[str, DensePart] = field(init=False)
    dense: Quality = field(init=False)
    largest: Any = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.host.parts()
        self.dense = self.host.quality(self.tests)
        self.heard = self.host.record(self.tests, _COMPARED_ROWS)
        with torch.no_grad():
            self.largest = max(self.tests, key=lambda batch: self.host.predict(batch).outputs_NV.shape[0])

    def dense_facts(self) -> dict[str, Any]:
        """What a row says of the dense host: its share of the neurons, and its quality."""
        figures = {name: round(value, 4) for name, value in self.dense.figures.items()}
        return {"share": 1.0, "score": round(self.dense.score, 5), **figures}

    def silent_share(self) -> float:
        """Share of activations that are zero on the test data, the mean over parts; with ReLU many are."""
        shares = [
            float((hidden_activations(part, self.heard[n]) == 0).float().mean()) for n, part in self.parts.items()
        ]
        return sum(shares) / len(shares)

    def measure(self, host: Host, layers: Mapping[str, SlicedLayer]) -> dict[str, Any]:
        """Quality and speed of a sliced host beside the dense one.

        Returns:
            `score` and the host's own figures; `output_error` and `mass_kept`, means over parts; milliseconds of the
            parts dense, dense in tiles and sliced, and how many times as fast they are (`speed_up`); the same of the
            whole model (`model_speed_up`).
        """
        quality = host.quality(self.tests)
        errors = [output_error(self.parts[name], layer, self.heard[name]) for name, layer in layers.items()]
        masses = [mass_kept(layer, self.heard[name]) for name, layer in layers.items()]
        speed = measure_speed(self.parts, layers, self.heard, self.repeat)
        whole = self._whole(host)
        return {
            "score": round(quality.score, 5),
            **{name: round(value, 4) for name, value in quality.figures.items()},
            "output_error": round(sum(errors) / len(errors), 4),
            "mass_kept": round(sum(masses) / len(masses), 4),
            "dense_ms": round(speed.dense, 2),
            "dense_tiled_ms": round(speed.dense_tiled, 2),
            "sliced_ms": round(speed.sliced, 2),
            "speed_up": round(speed.speed_up, 3),
            "model_speed_up": round(whole["dense"] / whole["sliced"], 3),
            "timed_rows": speed.rows,
        }

    def _whole(self, host: Host) -> dict[str, float]:
        ways = {"dense": partial(self.host.forward, self.largest), "sliced": partial(host.forward, self.largest)}
        device = next(host.model.parameters()).device
        with quiet(), torch.inference_mode():
            return {name: timing.milliseconds for name, timing in time_in_turn(ways, self.repeat, device).items()}


def sweep_cuts(
    bench: Bench, split: Split, slices: int, actives: Sequence[int], routers: Sequence[RouterKind], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """MoEfication of one host in one split: rows of each router and number of active slices.

    Args:
        bench: the host.
        split: which neurons make a slice.
        slices: E.
        actives: slices that compute a row.
        routers: "oracle", "centroid", "mlp"; the MLP is fitted once.
        seed: of what is drawn.
    """
    host = bench.host.clone()
    fitted: RouterKind = "mlp" if "mlp" in routers else routers[0]
    layers = slice_parts(bench.parts, Cut(split, slices, 1, fitted, seed), bench.rows)
    learned = {name: layer.router for name, layer in layers.items() if isinstance(layer.router, MLPRouter)}
    for name, layer in layers.items():
        host.put(name, layer)
    for router in routers:
        for active in actives:
            for name, layer in layers.items():
                mine = learned.get(name) if router == "mlp" else None
                if mine is not None:
                    mine.k = active
                layer.choose_router(router, active, mine)
            yield _facts(split, slices, router, active, 0) | bench.measure(host, layers)


def tuned_cut(
    bench: Bench,
    cut: Cut,
    teacher: Host,
    batches: Sequence[Any],
    steps: int,
) -> dict[str, Any]:
    """The row of one cut that is trained afterwards to say what the teacher says.

    Args:
        bench: the host.
        cut: how it is cut.
        teacher: the dense model.
        batches: of its training data.
        steps: of the training.
    """
    host = bench.host.clone()
    layers = slice_parts(bench.parts, cut, bench.rows)
    for name, layer in layers.items():
        host.put(name, layer)
    imitate(host, teacher, batches, steps, seed=cut.seed)
    return _facts(cut.split, cut.slices, cut.router, cut.active, steps) | bench.measure(host, layers)


def check_settings(path: Path, rows: Sequence[Row], settings: Mapping[str, int | str]) -> None:
    """Refuses to measure beside rows that come from other settings.

    Args:
        path: of the file of results.
        rows: of it, with which the new ones would be compared.
        settings: of the new ones. What a row does not say is not looked at; without a device it is of a CPU.

    Raises:
        MoleError: a row says something else.
    """
    for row in rows:
        for name, value in settings.items():
            old = row.get(name, "cpu" if name == "device" else value)
            if old != value:
                raise MoleError(
                    f"{path}: its rows of {row['model']} come from {name} {old}, not {value}; give the options "
                    "that they come from, or another --results"
                )


def _facts(split: Split, slices: int, router: RouterKind, active: int, tuned: int) -> dict[str, Any]:
    facts = {"split": split, "slices": slices, "router": router, "active": active, "tuned": tuned}
    return facts | {"share": round(active / slices, 4)}


def at_hand(kinds: Mapping[str, str], recogniser: Path) -> Iterator[str]:
    """Names of models that can be measured, of (name -> "text" or "speech"): those of speech need the recogniser."""
    for name, kind in kinds.items():
        if kind == "speech" and not (recogniser / "config.json").exists():
            print(f"{name}: left out, {recogniser} holds no recogniser; `make demo` trains one", flush=True)
            continue
        yield name
