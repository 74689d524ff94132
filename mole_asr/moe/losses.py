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


def load_balance_loss(plan: RoutingPlan, one_expert_only: bool = False) -> Tensor:
    """E * sum over e of (share of slots that chose e) * (mean probability of e): 1 when even (Switch Transformer).

    Args:
        plan: with `aux["probabilities"]` [U, E]; the loss is zero for a plan without units.
        one_expert_only: the share is that among the units with exactly one expert, the mean probability still that of
            all units (adaptive gating, arXiv 2310.07188); zero where no unit has exactly one.
    """
    p_UE, ids_UK = plan.aux["probabilities"], plan.expert_ids
    if one_expert_only:
        alone_U1 = (ids_UK < plan.num_experts).sum(-1, keepdim=True) == 1
        ids_UK = ids_UK.where(alone_U1, plan.num_experts)
    counts_E = expert_counts(ids_UK, plan.num_experts).to(p_UE.dtype)
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


def load_loss(plan: RoutingPlan) -> Tensor:
    """CV^2 of the experts' load, the number of units that chose each (Shazeer et al., 2017, appendix A).

    Where the router added noise (`aux["noisy_logits"]`, `aux["noise_std"]`), the smooth estimate: each unit counts with
    the probability that the expert were chosen if its noise were drawn anew and that of the others kept. Without
    noise, the plain count, which has no gradient.
    """
    if "noise_std" not in plan.aux or plan.top_k == plan.num_experts:
        return cv_squared(expert_counts(plan.expert_ids, plan.num_experts))
    noisy_UE, std_UE = plan.aux["noisy_logits"], plan.aux["noise_std"]
    last_U1, next_U1 = noisy_UE.topk(plan.top_k + 1, dim=-1).values[:, -2:].split(1, dim=-1)
    # An expert is chosen where it beats the k-th of the others: for a chosen one that is the first left out.
    to_beat_UE = next_U1.where(noisy_UE > next_U1, last_U1)
    chosen_UE = torch.special.ndtr((plan.aux["logits"] - to_beat_UE) / std_UE.clamp(min=1e-6))
    return cv_squared(chosen_UE.sum(0))


def router_z_loss(plan: RoutingPlan) -> Tensor:
    """Mean of squared logsumexp of the router's logits, which keeps them small (ST-MoE).

    Needs `plan.aux["logits"]` [U, E]; zero for a plan without units.
    """
    logits_UE = plan.aux["logits"]
    return logits_UE.logsumexp(-1).square().sum() / max(logits_UE.shape[0], 1)


def pseudo_label_loss(plan: RoutingPlan, labels_UE: Tensor) -> Tensor:
    """Mean KL(labels || softmax of the router's logits), FactorLLM's route loss; zero for a plan without units.

    Args:
        plan: with `aux["logits"]` [U, E].
        labels_UE: sum to one a unit, as those of `pseudo_labels.prior_approximate_labels`.
    """
    log_p_UE = plan.aux["logits"].log_softmax(-1)
    return functional.kl_div(log_p_UE, labels_UE.to(log_p_UE.dtype), reduction="sum") / max(plan.num_units, 1)


def activation_loss(plan: RoutingPlan, mass_UE: Tensor) -> Tensor:
    """Binary cross-entropy of the router's logits to how strongly each slice fires (MoEfication); zero without units.

    Args:
        plan: with `aux["logits"]` [U, E].
        mass_UE: as `pseudo_labels.activation_mass` gives it; the target is its share of the batch's maximum.
    """
    logits_UE = plan.aux["logits"]
    if not logits_UE.numel():
        return logits_UE.sum()
    mass_UE = mass_UE.to(logits_UE.dtype)
    return functional.binary_cross_entropy_with_logits(logits_UE, mass_UE / mass_UE.amax().clamp(min=1e-10))


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

    Where languages share experts, give the logits and the labels of the families (`routers.Families`).

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
