"""A group of experts chosen by language, and top-k inside the group.

Shape letters: B utterances, T frames, N rows (languages as the last letter of logits), U units (utterances or valid
frames), G groups, one a language, M experts a group, E = G * M experts, K experts a row, D model width.
"""

import torch
from torch import Tensor

from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers.base import LinearRouter, RoutingContext, check_k, gates_of, top_k
from mole_asr.moe.routers.language import language_logits_of, routed_language


class LanguageGroupRouter(LinearRouter):
    """The language chooses a group of experts; an unsupervised router of the group takes the best k in it (DLG-MoE).

    Paper (Huang et al., arXiv 2407.18581): a language router, shared by all layers and trained on language, sends each
    frame to its language's group; there an unsupervised top-k router chooses. The language posterior never weighs the
    output, so no recognition loss reaches the language logits through this router. Ours: the language logits come from
    outside, an utterance or a frame; the routers of all groups are one linear map; weights renormalised or raw.

    Group g has the experts g * M .. g * M + M - 1. Plan: layout "token". aux: "logits" [N, M] inside the group,
    "probabilities" [N, E] (zero outside the group), "language_logits" [U, G], "predicted" int64 [U].

    Args:
        d_model: D.
        num_languages: G.
        experts_per_language: M.
        k: experts a row, 1..M; it may be set anew for inference.
        renormalize: softmax over the chosen experts, so that their weights sum to one; else over the group.

    Raises:
        ValueError: k is not within 1..M.
    """

    def __init__(
        self,
        d_model: int,
        num_languages: int,
        experts_per_language: int,
        k: int,
        renormalize: bool = True,
    ) -> None:
        super().__init__(d_model, num_languages * experts_per_language)
        check_k(k, experts_per_language)
        self.num_languages, self.experts_per_language = num_languages, experts_per_language
        self.k, self.renormalize = k, renormalize

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows, or the context lacks the language logits, or they do not fit.
        """
        language_logits_UG = language_logits_of(self, context, self.num_languages)
        assert context is not None
        predicted_U = language_logits_UG.argmax(-1)
        group_U = routed_language(predicted_U, context)
        group_N = group_U if context.by_frame else group_U[context.rows.utterance_of_row]
        logits_NGM = self.logits(x_ND).unflatten(-1, (self.num_languages, self.experts_per_language))
        logits_NM = logits_NGM.take_along_dim(group_N[:, None, None], 1).squeeze(1)
        inside_NK = top_k(logits_NM, self.k)
        first_N1 = group_N[:, None] * self.experts_per_language
        own_NM = first_N1 + torch.arange(self.experts_per_language, device=group_N.device)
        p_NM = logits_NM.softmax(-1)
        p_NE = p_NM.new_zeros(p_NM.shape[0], self.num_experts).scatter(-1, own_NM, p_NM)
        aux = {
            "logits": logits_NM,
            "probabilities": p_NE,
            "language_logits": language_logits_UG,
            "predicted": predicted_U,
        }
        return self.plan(first_N1 + inside_NK, gates_of(logits_NM, inside_NK, self.renormalize), aux)
