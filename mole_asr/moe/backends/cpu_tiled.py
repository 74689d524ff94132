"""Any plan on the CPU: pairs sorted by expert, gathered tile by tile.

Shape letters: N rows, K experts a row, P pairs of a row and an expert, D model width.
"""

import torch
from torch import Tensor

from mole_asr.moe.backends.tiles import Schedule, Tile, run_tiles, shared_tiles, split, tile_rows
from mole_asr.moe.experts import Experts, compute_dtype
from mole_asr.moe.plan import RoutingPlan


def run(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> Tensor:
    """Compute the plan in tiles of gathered rows; see `dispatch`."""
    limit = tile_rows(experts, compute_dtype(x_ND))
    key = ("cpu_tiled", limit)
    token_plan = plan.to_token_layout(x_ND.shape[0])
    if key not in plan.schedules:
        plan.schedules[key] = _schedule(token_plan, limit)
    return run_tiles(x_ND, token_plan, experts, plan.schedules[key])


def _schedule(plan: RoutingPlan, limit: int) -> Schedule:
    """Sort the pairs by expert; slots without an expert come last and are cut off."""
    plan.check_ids()
    ids_P = plan.expert_ids.reshape(-1)
    # Few experts: one byte sorts fastest. The sort is stable, so the rows of an expert stay in order.
    order_P = (ids_P.to(torch.uint8) if plan.num_experts < 256 else ids_P).argsort(stable=True)
    counts = torch.bincount(ids_P, minlength=plan.num_experts + 1)[: plan.num_experts].tolist()
    order_P = order_P[: sum(counts)]
    rows_P = order_P if plan.top_k == 1 else order_P // plan.top_k
    tiles = [] if plan.shared_gates is None else shared_tiles(plan.num_units, limit)
    num_shared = 0 if plan.shared_gates is None else plan.num_units
    first = 0
    for expert, count in enumerate(counts):
        for start, end in split(first, first + count, limit):
            tiles.append(Tile(expert, rows_P[start:end], slice(num_shared + start, num_shared + end)))
        first += count
    shared_index_N = torch.arange(ids_P.numel(), ids_P.numel() + num_shared, device=ids_P.device)
    return Schedule(tiles, torch.cat([shared_index_N, order_P]))
