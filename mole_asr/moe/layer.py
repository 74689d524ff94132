"""The mixture-of-experts layer: router + experts on the valid rows of a padded batch.

Shape letters: B utterances, T frames, N valid rows, D model width.
"""

import torch
from torch import Tensor, nn

from mole_asr.moe.dispatch import Backend, dispatch
from mole_asr.moe.experts import Activation, Experts
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers import Router, RoutingContext
from mole_asr.moe.rows import PackedRows


class MoELayer(nn.Module):
    """A feed-forward layer whose rows are computed by the experts that a router, or the caller, chooses.

    Args:
        d_model: D.
        d_ff: width of each expert.
        num_experts: E, without the shared expert.
        router: makes the plan of each forward; layers may share one (see `Router`). None where every forward is given a
            plan, as with one language router for all layers.
        activation: "relu", "silu", "gelu", or one of `experts.GATED`.
        bias: whether the experts have biases.
        shared_expert: whether there is a shared expert that sees every row.
        backend: "auto", or a fixed backend of `dispatch`.
        slices: whether the experts are slices of one dense FFN: then no expert has an output bias, and the layer adds
            the one of the dense FFN to every valid row, whatever was chosen.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        router: Router | None = None,
        activation: Activation = "silu",
        bias: bool = True,
        shared_expert: bool = False,
        backend: Backend = "auto",
        slices: bool = False,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(num_experts, d_model, d_ff, activation, bias, shared_expert, output_bias=not slices)
        self.bias_D = nn.Parameter(torch.zeros(d_model)) if slices and bias else None
        self.backend = backend

    def forward(
        self,
        x_BTD: Tensor,
        lengths_B: Tensor | None = None,
        plan: RoutingPlan | None = None,
        context: RoutingContext | None = None,
        rows: PackedRows | None = None,
    ) -> tuple[Tensor, RoutingPlan]:
        """Route and compute the valid rows; padding reaches neither the router nor an expert.

        Args:
            x_BTD: a padded batch.
            lengths_B: valid frames of each utterance; may be left out where `rows` is given.
            plan: a ready plan over the valid rows; without it the layer's router makes one.
            context: what the router may look at beside the rows.
            rows: the packing of this batch, if the caller has it already.

        Returns:
            y_BTD, zero at padding, in the type of x; and the plan, for `losses` and `statistics`.

        Raises:
            ValueError: neither lengths nor rows, or neither plan nor router, or shapes that do not fit.
        """
        if rows is None:
            if lengths_B is None:
                raise ValueError("MoELayer needs lengths_B, or rows")
            rows = PackedRows.from_lengths(lengths_B, x_BTD.shape[1])
        x_ND = rows.pack(x_BTD)
        if plan is None:
            if self.router is None:
                raise ValueError("MoELayer without a router needs a plan")
            plan = self.router(x_ND, context)
        y_ND = dispatch(x_ND, plan, self.experts, self.backend)
        if self.bias_D is not None:
            y_ND = y_ND + self.bias_D.to(y_ND.dtype)
        return rows.unpack(y_ND), plan
