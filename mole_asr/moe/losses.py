"""Auxiliary losses of routing. All take packed rows or a plan, so padding is in none of them.

Shape letters: B utterances, T frames, N rows (languages as the last letter of logits), U units (utterances or valid
frames), E experts, K experts a row.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.rows import PackedRows


def expert_counts(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How many slots chose each expert, float32 [E]; slots without an expert are left out. Never waits for a device."""
    flat = expert_ids.reshape(-1).long()
    counts = torch.zeros(num_experts + 1, device=flat.device)
    return counts.scatter_add(0, flat, torch.ones_like(flat, dtype=counts.dtype))[:num_experts]


def load_balance_loss(plan: RoutingPlan) -> Tensor:
    """E * sum over e of (share of slots that chose e) * (mean probability of e): 1 when even (Switch Transformer).

    Needs `plan.aux["probabilities"]` [U, E]; zero for a plan without units.
    """
    p_UE = plan.aux["probabilities"]
    counts_E = expert_counts(plan.expert_ids, plan.num_experts).to(p_UE.dtype)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return plan.num_experts * (share_E * p_UE.sum(0)).sum() / max(plan.num_units, 1)


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation, variance / mean^2 (Shazeer et al., 2017); zero for one expert or no load."""
    return values_E.var(unbiased=False) / values_E.mean().square().clamp(min=1e-10)


def importance_loss(plan: RoutingPlan) -> Tensor:
    """CV^2 of the experts' importance, the sum of the gates that each was given (Shazeer et al., 2017)."""
    gates = plan.gates.reshape(-1)
    importance_E = gates.new_zeros(plan.num_experts + 1)
    importance_E = importance_E.scatter_add(0, plan.expert_ids.reshape(-1).long(), gates)
    return cv_squared(importance_E[: plan.num_experts])


def router_z_loss(plan: RoutingPlan) -> Tensor:
    """Mean of squared logsumexp of the router's logits, which keeps them small (ST-MoE).

    Needs `plan.aux["logits"]` [U, E]; zero for a plan without units.
    """
    logits_UE = plan.aux["logits"]
    return logits_UE.logsumexp(-1).square().sum() / max(logits_UE.shape[0], 1)


def language_loss(language_logits: Tensor, languages_B: Tensor, rows: PackedRows) -> Tensor:
    """Cross-entropy of the language tokenizer, averaged over units of known language; zero where there are none.

    Args:
        language_logits: [B, N], or [B, T, N] where each valid frame counts alike.
        languages_B: true languages; -1 where unknown, which is ignored.
        rows: the packing of the batch.
    """
    logits_UN, labels_U = _labelled_units(language_logits, languages_B, rows, per_frame=language_logits.dim() == 3)
    total = functional.cross_entropy(logits_UN.float(), labels_U, ignore_index=-1, reduction="sum")
    return total / (labels_U >= 0).sum().clamp(min=1)


def reliability_loss(
    reliability_logits: Tensor, language_logits: Tensor, languages_B: Tensor, rows: PackedRows
) -> Tensor:
    """Trains the reliability "sigmoid" to answer "was the argmax right?" (our interpretation of MoLE).

    Args:
        reliability_logits: [B] or [B, T].
        language_logits: [B, N] or [B, T, N]; no gradient flows into them.
        languages_B: true languages; -1 where unknown, which is ignored.
        rows: the packing of the batch.
    """
    per_frame = language_logits.dim() == 3
    logits_UN, labels_U = _labelled_units(language_logits.detach(), languages_B, rows, per_frame)
    reliability_U, _ = _labelled_units(reliability_logits, languages_B, rows, per_frame)
    right_U = (logits_UN.argmax(-1) == labels_U).to(torch.float32)
    known_U = (labels_U >= 0).to(torch.float32)
    losses_U = functional.binary_cross_entropy_with_logits(reliability_U.float(), right_U, reduction="none")
    return (losses_U * known_U).sum() / known_U.sum().clamp(min=1)


def _labelled_units(values: Tensor, languages_B: Tensor, rows: PackedRows, per_frame: bool) -> tuple[Tensor, Tensor]:
    """Values and labels of each utterance, or of each valid frame."""
    labels_B = languages_B.to(values.device).long()
    if not per_frame:
        return values, labels_B
    return rows.pack(values), labels_B[rows.utterance_of_row]
