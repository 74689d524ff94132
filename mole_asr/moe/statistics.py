"""What routing did: figures to log and to draw. Nothing here has a gradient, and padding is in none of them.

Shape letters: N rows, U units (utterances or valid frames), E experts, L languages.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_asr.moe.experts import Experts
from mole_asr.moe.losses import expert_counts
from mole_asr.moe.plan import RoutingPlan


@dataclass(frozen=True)
class RoutingStatistics:
    """Figures of one plan, as tensors on the plan's device, so that nothing waits for it.

    Attributes:
        load_E: share of the rows' slots that each expert computed; sums to one, or is zero where no expert was chosen.
        load_entropy: of `load_E`, divided by log E: 1 when even, 0 when one expert does all (and for one expert).
        experts_per_row: mean number of experts that computed a row, without the shared one.
        several_share: share of the rows that two or more experts computed.
        reliability: mean gate of the chosen experts; for a language router the mean reliability.
    """

    load_E: Tensor
    load_entropy: Tensor
    experts_per_row: Tensor
    several_share: Tensor
    reliability: Tensor


@torch.no_grad()
def routing_statistics(plan: RoutingPlan, num_rows: int) -> RoutingStatistics:
    """Figures of one plan, a row counting alike in both layouts.

    Args:
        plan: any plan.
        num_rows: N, the rows it is for.
    """
    plan = plan.to_token_layout(num_rows)
    counts_E = expert_counts(plan.expert_ids, plan.num_experts)
    total = counts_E.sum().clamp(min=1)
    load_E = counts_E / total
    chosen_NK = plan.expert_ids < plan.num_experts
    return RoutingStatistics(
        load_E=load_E,
        load_entropy=torch.special.entr(load_E).sum() / math.log(max(plan.num_experts, 2)),
        experts_per_row=counts_E.sum() / max(num_rows, 1),
        several_share=(chosen_NK.sum(-1) > 1).sum() / max(num_rows, 1),
        reliability=plan.gates.where(chosen_NK, 0).sum() / total,
    )


@torch.no_grad()
def loads_by_language(plan: RoutingPlan, languages_U: Tensor, num_languages: int) -> Tensor:
    """How many slots of each language's units chose each expert: float32 [L, E]. Sum it over batches, then `purity`.

    Args:
        plan: any plan.
        languages_U: true language of each unit of the plan; -1 where unknown, which is left out.
        num_languages: L.
    """
    width = plan.num_experts + 1
    cells_UK = languages_U.to(plan.expert_ids.device).long()[:, None] * width + plan.expert_ids
    unknown = num_languages * width
    cells_UK = cells_UK.where(languages_U.to(cells_UK.device)[:, None] >= 0, unknown).reshape(-1)
    counts = torch.zeros(unknown + 1, device=cells_UK.device)
    counts = counts.scatter_add(0, cells_UK, torch.ones_like(cells_UK, dtype=counts.dtype))
    return counts[:unknown].view(num_languages, width)[:, : plan.num_experts]


def purity(loads_LE: Tensor) -> Tensor:
    """Share of the slots that went to an expert from that expert's most frequent language; 1 is a pure separation."""
    return loads_LE.amax(0).sum() / loads_LE.sum().clamp(min=1)


@dataclass(frozen=True)
class ExpertCost:
    """Size and work of one MoE layer's experts, routers apart.

    Attributes:
        total_parameters: of all experts.
        active_parameters: those that one row uses.
        flops_per_row: forward, a multiplication and an addition counting as two; biases and activations left out.
    """

    total_parameters: int
    active_parameters: float
    flops_per_row: float


def expert_cost(experts: Experts, experts_per_row: float) -> ExpertCost:
    """Size and work of a layer's experts.

    Args:
        experts: the parameters.
        experts_per_row: experts that a row uses beside the shared one; K, or `RoutingStatistics.experts_per_row`.
    """
    used = experts_per_row + float(experts.shared)
    # Divided, not indexed: to index experts that are spread over ranks, all ranks would have to take part.
    one = sum(tensor.numel() for tensor in experts.stack() if tensor is not None) // experts.num_experts
    matrices = (experts.w1_EFD.numel() + experts.w2_EDF.numel()) // experts.num_experts
    return ExpertCost(sum(p.numel() for p in experts.parameters()), one * used, 2.0 * matrices * used)
