"""torch's own grouped matrix product: rows sorted by expert, two products for all experts.

Shape letters: N rows, K experts a row, E experts, P pairs of a row and an expert (sorted by expert), D model width,
F expert width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.moe.experts import Experts, activate, compute_dtype, feed_forward
from mole_asr.moe.plan import RoutingPlan


def takes(dtype: torch.dtype, widths: tuple[int, ...]) -> bool:
    """Whether torch can group products of this type with rows of these widths: multiples of 16 bytes."""
    return dtype != torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in widths)


def run(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> Tensor:
    """Compute the plan with `torch.nn.functional.grouped_mm`; see `dispatch`.

    Raises:
        ValueError: the type or a width is one that torch cannot group: float64, or rows of no multiple of 16 bytes.
    """
    dtype = compute_dtype(x_ND)
    widths = (experts.d_model, experts.d_ff)
    if not takes(dtype, widths):
        raise ValueError(f"grouped_mm computes no {dtype} with widths {widths}: rows must be multiples of 16 bytes")
    plan = plan.to_token_layout(x_ND.shape[0])
    ids_P, order_P = plan.expert_ids.reshape(-1).long().sort(stable=True)
    ends_E = torch.searchsorted(ids_P, torch.arange(plan.num_experts, device=ids_P.device), right=True).int()
    used_P = ids_P < plan.num_experts
    ids_P = ids_P.clamp(max=plan.num_experts - 1)
    rows_P = order_P // plan.top_k
    w1_EFD, b1_EF, w2_EDF, b2_ED = experts.stack()
    # Torch never writes what lies beyond the last group, neither products nor gradients: around each product, slots
    # without an expert must be replaced, not scaled.
    x_PD = x_ND[rows_P].where(used_P[:, None], 0)
    z_PF = functional.grouped_mm(x_PD.to(dtype), w1_EFD.to(dtype).mT, offs=ends_E)
    z_PF = z_PF if b1_EF is None else z_PF + _of_pairs(b1_EF, ids_P, dtype)
    a_PF = activate(z_PF.where(used_P[:, None], 0), experts.activation)
    out_PD = functional.grouped_mm(a_PF, w2_EDF.to(dtype).mT, offs=ends_E)
    out_PD = (out_PD if b2_ED is None else out_PD + _of_pairs(b2_ED, ids_P, dtype)).where(used_P[:, None], 0)
    gates_P = plan.gates.reshape(-1)[order_P]
    weighted_PD = (gates_P[:, None] * out_PD).where(used_P[:, None], 0)
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    y_ND = y_ND.index_add(0, rows_P, weighted_PD.to(y_ND.dtype))
    shared = experts.shared_weights()
    if plan.shared_gates is not None and shared is not None:
        y_ND = y_ND + plan.shared_gates[:, None] * feed_forward(x_ND, shared, experts.activation)
    return y_ND.to(x_ND.dtype)


def _of_pairs(b_EF: Tensor, ids_P: Tensor, dtype: torch.dtype) -> Tensor:
    """Each pair's bias. The gradient of a bias is a sum over all its rows, in float32 whatever the products are."""
    return b_EF.float().index_select(0, ids_P).to(dtype)
