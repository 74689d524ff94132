"""Experts choose rows.

Shape letters: N rows, E experts, C rows an expert chooses, K = E slots a row.
"""

import math

import torch
from torch import Tensor

from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers.base import LinearRouter, RoutingContext


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes the C rows that give it the highest probability: the load is even by construction.

    Zhou et al., arXiv 2202.09368: p = softmax over experts of a linear map; each expert takes the
    C = N * capacity / E rows with the highest p (here rounded up), with p as the weight. A row may be taken by no
    expert or by all. The choice depends on all rows of the batch, so it suits neither streaming nor causal models, and
    an utterance's result depends on its neighbours.

    Plan: layout "token" with E slots a row; slot e holds expert e, or E ("no expert"). aux: "logits" and
    "probabilities" [N, E], float32.

    Args:
        d_model: D.
        num_experts: E.
        capacity: mean number of experts a row, above 0 and at most E.
        shared_expert: whether the plan adds the layer's shared expert, with weight one.

    Raises:
        ValueError: the capacity is out of range.
    """

    def __init__(self, d_model: int, num_experts: int, capacity: float = 2.0, shared_expert: bool = False) -> None:
        super().__init__(d_model, num_experts, shared_expert)
        if not 0 < capacity <= num_experts:
            raise ValueError(f"capacity must lie above 0 and at most at {num_experts}, the experts, not {capacity}")
        self.capacity = capacity

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows.
        """
        logits_NE = self.logits(x_ND)
        p_NE = logits_NE.softmax(-1)
        rows_an_expert = math.ceil(p_NE.shape[0] * self.capacity / self.num_experts)
        rows_CE = p_NE.detach().topk(rows_an_expert, dim=0).indices
        chosen_NE = torch.zeros_like(p_NE, dtype=torch.bool).scatter(0, rows_CE, True)
        ids_NE = torch.arange(self.num_experts, device=p_NE.device).where(chosen_NE, self.num_experts)
        aux = {"logits": logits_NE, "probabilities": p_NE}
        return self.plan(ids_NE, p_NE.where(chosen_NE, 0), aux)
