"""A dense FFN cut into slices of its neurons, no value changed (MoEfication, FactorLLM).

Shape letters: E experts, D model width, H width of the dense FFN, F = H / E width of a slice.
"""

import torch
from torch import Tensor, nn

from mole_asr.moe.experts import GATED, Activation, ExpertWeights
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.routers.base import Router


def contiguous_groups(d_ff: int, num_experts: int) -> Tensor:
    """The neurons of a dense FFN in their order, in equal groups: int64 [E, F].

    Raises:
        ValueError: the width cannot be divided evenly.
    """
    if num_experts < 1 or d_ff % num_experts:
        raise ValueError(f"a dense FFN of {d_ff} neurons cannot be cut into {num_experts} equal experts")
    return torch.arange(d_ff).view(num_experts, -1)


def slice_dense(
    dense: ExpertWeights, groups_EF: Tensor, activation: Activation, router: Router | None = None
) -> MoELayer:
    """A layer whose experts are groups of neurons of a dense FFN: rows of its first matrix, columns of its second.

    As the hidden neurons of an FFN are independent, the slices' outputs add up to the dense output: with all of them
    chosen and weights of one, as `routers.slices` gives them for k = E, the layer is the dense FFN. The output bias
    belongs to no slice; the layer adds it once.

    Args:
        dense: the tensors of the dense FFN, H wide; with a gated activation the first matrix has 2H rows, gate first.
            They are copied.
        groups_EF: the neurons of each expert; every neuron once.
        activation: of the dense FFN.
        router: of the layer; None to set it later, or to give a plan to every forward.

    Raises:
        ValueError: the groups do not hold every neuron once, or the first matrix has not the rows of the activation.
    """
    d_model, d_ff = dense.w2_DF.shape
    stacked = 2 if activation in GATED else 1
    if dense.w1_FD.shape != (stacked * d_ff, d_model):
        expected = (stacked * d_ff, d_model)
        raise ValueError(f"w1 must be {expected} for {activation!r} and this w2, not {tuple(dense.w1_FD.shape)}")
    groups_EF = groups_EF.to(dense.w1_FD.device)
    if groups_EF.dim() != 2 or not torch.equal(
        groups_EF.flatten().sort().values, torch.arange(d_ff, device=groups_EF.device)
    ):
        raise ValueError(f"groups_EF must hold each of the {d_ff} neurons once")
    num_experts, width = groups_EF.shape
    bias = dense.b1_F is not None or dense.b2_D is not None
    layer = MoELayer(d_model, width, num_experts, router, activation, bias, slices=True)
    # The gate and the value of a gated neuron lie H rows apart.
    rows_EF = torch.cat([groups_EF + part * d_ff for part in range(stacked)], dim=1)
    set_parameters(layer.experts, w1_EFD=dense.w1_FD[rows_EF], w2_EDF=dense.w2_DF[:, groups_EF].transpose(0, 1))
    if bias:
        b1_F = dense.w1_FD.new_zeros(len(dense.w1_FD)) if dense.b1_F is None else dense.b1_F
        set_parameters(layer.experts, b1_EF=b1_F[rows_EF])
        set_parameters(layer, bias_D=dense.w2_DF.new_zeros(d_model) if dense.b2_D is None else dense.b2_D)
    return layer


def set_parameters(module: nn.Module, **values: Tensor) -> None:
    """Replace parameters by copies of these values, in the values' type and on their device.

    Raises:
        ValueError: a shape differs.
    """
    for name, value in values.items():
        old = module.get_parameter(name)
        if old.shape != value.shape:
            raise ValueError(f"{name} must be {tuple(old.shape)}, not {tuple(value.shape)}")
        setattr(module, name, nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)))
