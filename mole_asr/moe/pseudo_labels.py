"""Which slices of a dense FFN a row needs, asked of the slices themselves: what slice routers are trained towards.

All of it costs as much as the dense FFN and has no gradient. Products are computed in the type of the slices, what is
compared at least in float32.

Shape letters: N rows, E experts, K experts a row, D model width, F expert width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.moe.experts import Experts, activate, feed_forward


@torch.no_grad()
def activation_mass(x_ND: Tensor, experts: Experts) -> Tensor:
    """How strongly each slice fires on each row: the sum of its neurons' absolute activations, [N, E].

    MoEfication (Zhang et al., arXiv 2110.01786) sums the positive activations of ReLU networks, which is the same
    there. Absolute values for the other activations are ours.
    """
    exact = torch.promote_types(experts.w1_EFD.dtype, torch.float32)
    with torch.autocast(x_ND.device.type, enabled=False):
        mass = [
            activate(functional.linear(x_ND.to(w1_FD.dtype), w1_FD, b1_F), experts.activation)
            .abs()
            .sum(-1, dtype=exact)
            for w1_FD, b1_F, _, _ in experts.unbind()
        ]
    return torch.stack(mass, dim=-1)


@torch.no_grad()
def prior_approximate_labels(x_ND: Tensor, experts: Experts, k: int, dense_ND: Tensor | None = None) -> Tensor:
    """The k slices that come closest to the dense output, each with the label 1 / k and the others with 0, [N, E].

    FactorLLM (Zhao et al., arXiv 2408.11855): for the row x and the slice e, m_e = MSE(E_e(x), F(x) / (E / k)); the k
    slices of the smallest m are the target. Ours: labels that sum to one, where the published code takes the softmax
    of a 0/1 vector.

    Args:
        x_ND: rows.
        experts: the slices.
        k: slices a row.
        dense_ND: F(x) without the output bias, which no slice gives; None for the sum of the slices, which it is as
            long as they are not trained.
    """
    with torch.autocast(x_ND.device.type, enabled=False):
        x_ND = x_ND.to(experts.w1_EFD.dtype)
        exact = torch.promote_types(x_ND.dtype, torch.float32)  # near ties are not decided by rounding
        outputs = [feed_forward(x_ND, weights, experts.activation).to(exact) for weights in experts.unbind()]
    dense_ND = torch.stack(outputs).sum(0) if dense_ND is None else dense_ND
    target_ND = dense_ND * (k / experts.num_experts)
    errors_NE = torch.stack([(output - target_ND).square().mean(-1) for output in outputs], dim=-1)
    nearest_NK = errors_NE.topk(k, dim=-1, largest=False).indices
    return torch.zeros_like(errors_NE).scatter(-1, nearest_NK, 1 / k)
