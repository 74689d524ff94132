"""One or two experts a row, by how sure the router is.

Shape letters: N rows, E experts, K = 2 experts a row (1 where there is one expert).
"""

from torch import Tensor

from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers.base import LinearRouter, RoutingContext, top_k


class AdaptiveRouter(LinearRouter):
    """The best expert alone where it leads by more than a threshold, else the best two (adaptive gating).

    Paper (Li et al., EMNLP 2023, arXiv 2310.07188): p = softmax of a linear map; the second expert is left out where
    p1 - p2 > T, T = 0.1; the weights are the raw p; the balance loss counts the rows of one expert only
    (`losses.load_balance_loss(plan, one_expert_only=True)`). T = 0 is top-1, up to exact ties, and T = 1 is top-2.
    Ours: weights renormalised over the chosen as an option, and the shared expert.

    Plan: layout "token"; the second id is E ("no expert") where it is left out. aux: "logits" and "probabilities"
    [N, E], float32.

    Args:
        d_model: D.
        num_experts: E.
        threshold: T, 0..1.
        renormalize: whether the weights of a row sum to one.
        shared_expert: whether the plan adds the layer's shared expert, with weight one.

    Raises:
        ValueError: the threshold is not within 0..1.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        threshold: float = 0.1,
        renormalize: bool = False,
        shared_expert: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts, shared_expert)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in 0..1, not {threshold}")
        self.threshold, self.renormalize = threshold, renormalize

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows.
        """
        logits_NE = self.logits(x_ND)
        p_NE = logits_NE.softmax(-1)
        ids_NK = top_k(logits_NE, min(2, self.num_experts))
        gates_NK = p_NE.gather(-1, ids_NK)
        kept_NK = ~(gates_NK[:, :1] - gates_NK > self.threshold)  # NaN is kept: it must not look like "no expert"
        gates_NK = gates_NK.where(kept_NK, 0)
        if self.renormalize:
            gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True)
        aux = {"logits": logits_NE, "probabilities": p_NE}
        return self.plan(ids_NK.where(kept_NK, self.num_experts), gates_NK, aux)
