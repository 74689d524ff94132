"""The oracle: a loop over experts in plain differentiable operations, any device and float type.

Shape letters: N rows, K experts a row, D model width.
"""

import torch
from torch import Tensor

from mole_asr.moe.experts import Experts, feed_forward
from mole_asr.moe.plan import RoutingPlan


def run(x_ND: Tensor, plan: RoutingPlan, experts: Experts) -> Tensor:
    """Compute the plan expert by expert; see `dispatch`. Checks the plan's values, so it waits for the device.

    Raises:
        ValueError: an expert id is out of range.
    """
    plan.check_ids()
    plan = plan.to_token_layout(x_ND.shape[0])
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    for expert, weights in enumerate(experts.unbind()):
        rows, slots = (plan.expert_ids == expert).nonzero(as_tuple=True)
        output = plan.gates[rows, slots, None] * feed_forward(x_ND[rows], weights, experts.activation)
        y_ND = y_ND.index_add(0, rows, output.to(y_ND.dtype))
    shared = experts.shared_weights()
    if plan.shared_gates is not None and shared is not None:
        y_ND = y_ND + plan.shared_gates[:, None] * feed_forward(x_ND, shared, experts.activation)
    return y_ND.to(x_ND.dtype)
