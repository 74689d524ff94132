"""How fast sliced parts are beside dense ones: timed in turn, in one run, on one thread of a CPU, or on a GPU.

Letters: N rows, D model width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mole_asr.bench.timing import quiet, time_in_turn
from mole_asr.convert.host import DensePart
from mole_asr.moe.convert.sliced import SlicedFeedForward, SlicedLayer
from mole_asr.moe.convert.slices import contiguous_groups, slice_dense
from mole_asr.moe.dispatch import dispatch
from mole_asr.moe.plan import RoutingPlan

ROWS = 4096


@dataclass(frozen=True)
class Speed:
    """Milliseconds of all parts together, medians.

    Attributes:
        dense: as the model computes them.
        dense_tiled: by our kernels for one expert, the faster way to compute a dense part.
        sliced: routers included.
        rows: in a batch.
        place: "one thread", or the kind of device.
    """

    dense: float
    dense_tiled: float
    sliced: float
    rows: int
    place: str

    @property
    def speed_up(self) -> float:
        """Over the faster of the two dense ways."""
        return min(self.dense, self.dense_tiled) / self.sliced


def measure_speed(
    parts: Mapping[str, DensePart],
    layers: Mapping[str, SlicedLayer],
    rows: Mapping[str, Tensor] | None = None,
    repeat: int = 7,
    num_rows: int | None = None,
) -> Speed:
    """Times dense and sliced parts in turn, on the same rows.

    Args:
        parts: the dense parts.
        layers: the sliced ones, by the same names.
        rows: that each part gets in real use, as many as there are; None for drawn ones.
        repeat: how often; the medians count.
        num_rows: of a batch, `ROWS` if not given; fewer are repeated.
    """
    totals, num_rows = {"dense": 0.0, "dense_tiled": 0.0, "sliced": 0.0}, num_rows or ROWS
    with quiet(), torch.inference_mode():
        for name, layer in layers.items():
            x_ND = _rows(None if rows is None else rows[name], num_rows, parts[name])
            timings = time_in_turn(_ways(parts[name], layer, x_ND), repeat, x_ND.device)
            for way, timing in timings.items():
                totals[way] += timing.milliseconds
    device = next(iter(parts.values())).weights.w1_FD.device.type
    place = "one thread" if device == "cpu" else device
    return Speed(totals["dense"], totals["dense_tiled"], totals["sliced"], num_rows, place)


def _ways(part: DensePart, layer: SlicedLayer, x_ND: Tensor) -> dict[str, Callable[[], object]]:
    weights = part.weights
    whole = slice_dense(weights, contiguous_groups(weights.w2_DF.shape[1], 1), part.activation)

    def tiled() -> Tensor:
        ends = torch.tensor([0, len(x_ND)], device=x_ND.device)
        ids_11 = torch.zeros(1, 1, dtype=torch.int32, device=x_ND.device)
        plan = RoutingPlan(ids_11, torch.ones(1, 1, device=x_ND.device), 1, "segment", ends)
        y_ND = dispatch(x_ND, plan, whole.experts)
        return y_ND if whole.bias_D is None else y_ND + whole.bias_D

    return {"dense": partial(part.run, x_ND), "dense_tiled": tiled, "sliced": partial(SlicedFeedForward(layer), x_ND)}


def _rows(found_ND: Tensor | None, num_rows: int, part: DensePart) -> Tensor:
    w1_FD = part.weights.w1_FD
    if found_ND is None or not len(found_ND):
        return torch.randn(num_rows, w1_FD.shape[1], generator=torch.Generator().manual_seed(0)).to(w1_FD)
    return found_ND.repeat(-(-num_rows // len(found_ND)), 1)[:num_rows].to(w1_FD)
