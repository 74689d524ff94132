"""The k experts with the highest scores, with or without noise.

Shape letters: N rows, E experts, K experts a row, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers.base import LinearRouter, RoutingContext, check_k, gates_of, linear_scores, top_k


class TopKRouter(LinearRouter):
    """The k experts with the highest scores of a linear map of the row, weighted by their softmax.

    With k = 1 and renormalised weights every weight is one: the router then learns from its losses alone.

    Plan: layout "token". aux: "logits" and "probabilities" [N, E], float32; where noise is added, also "noisy_logits"
    and "noise_std" [N, E]. Noise changes the choice, the weights and the probabilities.

    Args:
        d_model: D.
        num_experts: E.
        k: experts a row.
        renormalize: softmax over the chosen experts, so that their weights sum to one; else over all experts.
        noise_std: standard deviation of the Gaussian noise on the scores in training.
        shared_expert: whether the plan adds the layer's shared expert, with weight one.

    Raises:
        ValueError: k is not within 1..E.
    """

    temperature: float = 1.0

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int,
        renormalize: bool = True,
        noise_std: float = 0.0,
        shared_expert: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts, shared_expert)
        check_k(k, num_experts)
        self.k, self.renormalize, self.noise_std = k, renormalize, noise_std

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows.
        """
        logits_NE = scores_NE = self.logits(x_ND)
        aux = {"logits": logits_NE}
        std_NE = self._noise(x_ND, logits_NE) if self.training else None
        if std_NE is not None:
            generator = None if context is None else context.generator
            draw_NE = torch.randn(logits_NE.shape, generator=generator, device=logits_NE.device, dtype=logits_NE.dtype)
            scores_NE = logits_NE + std_NE * draw_NE
            aux |= {"noisy_logits": scores_NE, "noise_std": std_NE}
        ids_NK = self._choose(scores_NE, context)
        scores_NE = scores_NE / self.temperature
        aux["probabilities"] = scores_NE.softmax(-1)
        return self.plan(ids_NK, gates_of(scores_NE, ids_NK, self.renormalize), aux)

    def _noise(self, x_ND: Tensor | None, logits_NE: Tensor) -> Tensor | None:
        """The standard deviation of the noise on each score, None for no noise."""
        return torch.full_like(logits_NE, self.noise_std) if self.noise_std > 0 else None

    def _choose(self, scores_NE: Tensor, context: RoutingContext | None) -> Tensor:
        return top_k(scores_NE, self.k)


class NoisyTopKRouter(TopKRouter):
    """Top-k of scores with noise whose strength is learned, weighted by a softmax with temperature (MoKGR).

    Q = E c + eps * softplus(W c) with eps ~ N(0, 1) in training; the weights are the softmax of Q / temperature over
    the k chosen experts (Du, Liu & Zhang, arXiv 2507.20498; the noise is that of Shazeer et al., arXiv 1701.06538).
    There the experts are path lengths, c is the context of a query, and the rows of E are the experts' embeddings: the
    weight of this router's linear map. To choose one expert a query, give the contexts of the queries as rows.
    Ours: W starts at zero, as Shazeer's does, and evaluation adds no noise. `losses.load_loss` balances the choice.

    Args:
        d_model: D.
        num_experts: E.
        k: experts a row.
        temperature: of the weights; positive. It does not change the choice.
        shared_expert: whether the plan adds the layer's shared expert, with weight one.

    Raises:
        ValueError: k is not within 1..E, or the temperature is not positive.
    """

    def __init__(
        self, d_model: int, num_experts: int, k: int, temperature: float = 1.0, shared_expert: bool = False
    ) -> None:
        super().__init__(d_model, num_experts, k, shared_expert=shared_expert)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.temperature = temperature
        self.noise = nn.Linear(d_model, num_experts, bias=False)
        nn.init.zeros_(self.noise.weight)

    def _noise(self, x_ND: Tensor | None, logits_NE: Tensor) -> Tensor | None:
        assert x_ND is not None
        return functional.softplus(linear_scores(x_ND, self.noise.weight))
