"""Stacked feed-forward experts and the shared expert.

Shape letters: E experts, D model width, F expert width (the first product gives 2F with a gated activation), N rows.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["relu", "silu", "gelu", "swiglu", "reglu", "geglu"]
GATED = ("swiglu", "reglu", "geglu")
"""Activations of 2F values, gate first: silu, relu or gelu (by tanh, as T5 has it) of the gate, times the value."""


class ExpertWeights(NamedTuple):
    """The tensors of one expert, or of a stack of experts where each has a leading E."""

    w1_FD: Tensor
    b1_F: Tensor | None
    w2_DF: Tensor
    b2_D: Tensor | None


def activate(z_NF: Tensor, activation: Activation) -> Tensor:
    """Apply the activation; one of `GATED` takes [N, 2F] (gate, then value) and gives [N, F]."""
    if activation in GATED:
        gate_NF, value_NF = z_NF.chunk(2, dim=-1)
        return activate_gate(gate_NF, activation) * value_NF
    if activation == "relu":
        return torch.relu(z_NF)
    return functional.silu(z_NF) if activation == "silu" else functional.gelu(z_NF)


def activate_gate(gate_NF: Tensor, activation: Activation) -> Tensor:
    """What the values are multiplied by, of one of `GATED`."""
    if activation == "swiglu":
        return functional.silu(gate_NF)
    return torch.relu(gate_NF) if activation == "reglu" else functional.gelu(gate_NF, approximate="tanh")


def feed_forward(x_ND: Tensor, weights: ExpertWeights, activation: Activation) -> Tensor:
    """One expert on its rows, written plainly: the meaning that every backend must have."""
    z_NF = functional.linear(x_ND, weights.w1_FD, weights.b1_F)
    return functional.linear(activate(z_NF, activation), weights.w2_DF, weights.b2_D)


def compute_dtype(x_ND: Tensor) -> torch.dtype:
    """The type the products are computed in: autocast's if it is on (never for float64), else that of x."""
    device = x_ND.device.type
    if torch.is_autocast_enabled(device) and x_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x_ND.dtype


class Experts(nn.Module):
    """The parameters of E experts, each D -> F -> D, and of one shared expert of the same shape.

    An expert starts as `nn.Linear` does, from the fan-in of its own matrices.

    Args:
        num_experts: E, without the shared expert.
        d_model: D.
        d_ff: F.
        activation: "relu", "silu", "gelu", or one of `GATED`.
        bias: whether both products add a bias.
        shared: whether there is a shared expert.
        output_bias: False leaves out the second bias, the shared expert's too: slices of one dense layer have one
            output bias together, which their layer adds.

    Raises:
        ValueError: a size below one or an unknown activation.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        activation: Activation = "silu",
        bias: bool = True,
        shared: bool = False,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, not {activation!r}")
        if min(num_experts, d_model, d_ff) < 1:
            raise ValueError(f"sizes must be positive: {num_experts=}, {d_model=}, {d_ff=}")
        self.num_experts, self.d_model, self.d_ff = num_experts, d_model, d_ff
        self.activation: Activation = activation
        self.shared = shared
        up = 2 * d_ff if activation in GATED else d_ff
        self.w1_EFD = nn.Parameter(torch.empty(num_experts, up, d_model))
        self.b1_EF = nn.Parameter(torch.empty(num_experts, up)) if bias else None
        self.w2_EDF = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.b2_ED = nn.Parameter(torch.empty(num_experts, d_model)) if bias and output_bias else None
        self.shared_w1_FD = nn.Parameter(torch.empty(up, d_model)) if shared else None
        self.shared_b1_F = nn.Parameter(torch.empty(up)) if shared and bias else None
        self.shared_w2_DF = nn.Parameter(torch.empty(d_model, d_ff)) if shared else None
        self.shared_b2_D = nn.Parameter(torch.empty(d_model)) if shared and bias and output_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, uniform in +-1/sqrt(fan-in) as `nn.Linear` does."""
        for name, parameter in self.named_parameters():
            fan_in = self.d_model if "1_" in name else self.d_ff
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def stack(self) -> ExpertWeights:
        """The E experts' parameters, each with a leading E."""
        return ExpertWeights(self.w1_EFD, self.b1_EF, self.w2_EDF, self.b2_ED)

    def shared_weights(self) -> ExpertWeights | None:
        """The shared expert's parameters, or None where there is no shared expert."""
        if self.shared_w1_FD is None or self.shared_w2_DF is None:
            return None
        return ExpertWeights(self.shared_w1_FD, self.shared_b1_F, self.shared_w2_DF, self.shared_b2_D)

    def unbind(self) -> list[ExpertWeights]:
        """One expert's parameters each. Under autograd, indexing a stack in a loop costs O(E^2); this does not."""
        stacks = [[None] * self.num_experts if tensor is None else tensor.unbind(0) for tensor in self.stack()]
        return [ExpertWeights(*tensors) for tensors in zip(*stacks, strict=True)]

    def keep(self, experts: Sequence[int]) -> None:
        """Leaves only these of the E experts, in this order; their parameters are new ones."""
        self.num_experts = len(experts)
        for name in ("w1_EFD", "b1_EF", "w2_EDF", "b2_ED"):
            stack = getattr(self, name)
            if stack is not None:
                setattr(self, name, nn.Parameter(stack.detach()[list(experts)], stack.requires_grad))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        shared = ", shared" if self.shared else ""
        return f"{self.num_experts} x ({self.d_model} -> {self.d_ff} -> {self.d_model}), {self.activation}{shared}"
