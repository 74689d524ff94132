"""Top-k with the expert of the row's own language among the chosen.

Shape letters: B utterances, N rows, E experts, K experts a row, D model width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mole_asr.moe.routers.base import RoutingContext, top_k
from mole_asr.moe.routers.families import Families
from mole_asr.moe.routers.top_k import TopKRouter


class ForcedLabelRouter(TopKRouter):
    """Top-k that in training always has the expert of the row's language among the chosen (Post-MoE's hybrid routing).

    Paper (Zheng et al., arXiv 2410.10626): top-2; in training, where the token's language expert is not among the two,
    it replaces the lower one; at inference, plain top-2; raw softmax weights. Ours: any k from 2 on, the label
    replacing the lowest pick; plain routing where the language is unknown; and renormalised weights by default, with
    which a layer upcycled from a dense one starts as that dense one (`convert.upcycle_dense`).

    The languages are `languages_B` of the context. Plan and aux: as `TopKRouter`.

    Args:
        d_model: D.
        num_experts: E.
        k: experts a row, 2..E (1 where there is one expert).
        renormalize: softmax over the chosen experts, so that their weights sum to one; else over all experts.
        families: for each language its expert; None where language n has expert n.
        shared_expert: whether the plan adds the layer's shared expert, with weight one.

    Raises:
        ValueError: k would let the label displace the highest pick, or families and experts do not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int = 2,
        renormalize: bool = True,
        families: Sequence[int] | None = None,
        shared_expert: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts, k, renormalize, shared_expert=shared_expert)
        if k < min(2, num_experts):
            raise ValueError(f"k must be at least 2, so that the label displaces no highest pick, not {k}")
        self.families = None if families is None else Families(families)
        if self.families is not None and self.families.num_families != num_experts:
            raise ValueError(f"{self.families.num_families} families need as many experts, not {num_experts}")

    def _choose(self, scores_NE: Tensor, context: RoutingContext | None) -> Tensor:
        ids_NK = top_k(scores_NE, self.k)
        if not self.training or context is None or context.languages_B is None:
            return ids_NK
        labels_B = context.languages_B.to(ids_NK.device).long()
        labels_B = labels_B if self.families is None else self.families.of(labels_B)
        label_N1 = labels_B[context.rows.utterance_of_row][:, None]
        forced_N1 = (label_N1 >= 0) & (ids_NK != label_N1).all(dim=-1, keepdim=True)
        last_N1 = label_N1.where(forced_N1, ids_NK[:, -1:])
        return torch.cat([ids_NK[:, :-1], last_N1], dim=-1)
