"""Plans in the layout "segment": rows of an expert already lie together, so nothing is sorted or gathered.

Neighbouring segments of one expert become one product; sort a batch by language and there is one product a language.

The shared expert is a pair of products of its own. One pair on the weights of both, put together, was measured slower
(8192 rows, four languages, width 256 and 512, over two dense layers: 0.67 and 0.80 against 0.65 and 0.75 in float32,
1.01 and 0.92 against 0.98 and 0.85 in bfloat16): the weights are copied for each language, and the gates multiply the
hidden layer, four times as wide as the output.

Shape letters: N rows, K experts a segment, U segments, P pairs of a row and an expert, D model width.
"""

import torch
from torch import Tensor

from mole_asr.moe.backends.tiles import Schedule, Tile, run_tiles, shared_tiles, split, tile_rows
from mole_asr.moe.experts import Experts, compute_dtype
from mole_asr.moe.plan import RoutingPlan


def run(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> Tensor:
    """Compute the plan on slices of the rows; see `dispatch`. On a GPU, waits for the device once a plan."""
    limit = tile_rows(experts, compute_dtype(x_ND))
    key = ("segment", limit)
    if key not in plan.schedules:
        plan.schedules[key] = _schedule(plan, x_ND.shape[0], limit)
    return run_tiles(x_ND, plan, experts, plan.schedules[key])


def _schedule(plan: RoutingPlan, num_rows: int, limit: int) -> Schedule:
    plan.check_ids()
    unit_N = plan.unit_of_row(num_rows)
    tiles: list[Tile] = []
    gate_index: list[Tensor] = []
    first_pair = 0
    if plan.shared_gates is not None:
        tiles += shared_tiles(num_rows, limit)
        gate_index.append(unit_N + plan.num_units * plan.top_k)
        first_pair = num_rows
    for slot, ids in enumerate(plan.expert_ids.t().tolist()):
        for expert, run_start, run_end in _merge(ids, plan.bounds):
            if expert == plan.num_experts:
                continue
            gate_index.append(unit_N[run_start:run_end] * plan.top_k + slot)
            for start, end in split(run_start, run_end, limit):
                tiles.append(Tile(expert, slice(start, end), slice(first_pair, first_pair + end - start)))
                first_pair += end - start
    return Schedule(tiles, torch.cat(gate_index) if gate_index else unit_N[:0])


def _merge(ids: list[int], bounds: list[int]) -> list[tuple[int, int, int]]:
    """Runs of neighbouring segments of one expert: (expert, first row, end row), empty ones left out."""
    runs: list[tuple[int, int, int]] = []
    for expert, start, end in zip(ids, bounds[:-1], bounds[1:], strict=True):
        if start == end:
            continue
        if runs and runs[-1][0] == expert:
            runs[-1] = (expert, runs[-1][1], end)
        else:
            runs.append((expert, start, end))
    return runs
