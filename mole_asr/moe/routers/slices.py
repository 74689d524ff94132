"""Routers for experts that are slices of one dense FFN (`convert.slice_dense`); the chosen slices are not weighted.

The output gives these routers no gradient: they are computed from the weights, fitted offline, or trained towards
`pseudo_labels`.

Shape letters: N rows, E experts, K experts a row, D model width, F expert width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.moe.experts import Experts
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.pseudo_labels import activation_mass
from mole_asr.moe.routers.base import (
    LinearRouter,
    Router,
    RoutingContext,
    check_k,
    linear_scores,
    need_rows,
    top_k,
)


def expert_centroids(experts: Experts) -> Tensor:
    """The mean of each slice's L2-normalised neurons (rows of the first matrix; of its gate if it has one), [E, D]."""
    w1_EFD = experts.w1_EFD.detach()[:, : experts.d_ff]
    return functional.normalize(w1_EFD, dim=-1).mean(1)


class CentroidRouter(Router):
    """The k slices whose mean neuron is most similar to the row (MoEfication's similarity router).

    Score: x / |x| times the slice's centroid (Zhang et al., arXiv 2110.01786). Nothing is trained.

    Plan: layout "token", all gates one. aux: "scores" [N, E], float32.

    Args:
        centroids_ED: as `expert_centroids` gives them; saved with the model.
        k: slices a row.

    Raises:
        ValueError: k is not within 1..E.
    """

    centroids_ED: Tensor

    def __init__(self, centroids_ED: Tensor, k: int) -> None:
        super().__init__()
        check_k(k, centroids_ED.shape[0])
        self.k = k
        self.register_buffer("centroids_ED", centroids_ED.detach().clone())

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows.
        """
        scores_NE = _similarities(need_rows(self, x_ND), self.centroids_ED)
        return _unweighted(scores_NE, self.k, 1.0, {"scores": scores_NE})


class MLPRouter(Router):
    """The k slices with the highest scores of a small MLP (MoEfication's learned router).

    Linear(D, E) -> tanh -> Linear(E, E) without biases on x / |x|; it starts with the centroids and the identity, so as
    tanh of the similarity router. Fit it with `losses.activation_loss` on `pseudo_labels.activation_mass` (Zhang et
    al., arXiv 2110.01786).

    Plan: layout "token", all gates one. aux: "logits" [N, E], float32.

    Args:
        centroids_ED: as `expert_centroids` gives them.
        k: slices a row.

    Raises:
        ValueError: k is not within 1..E.
    """

    def __init__(self, centroids_ED: Tensor, k: int) -> None:
        super().__init__()
        check_k(k, centroids_ED.shape[0])
        self.k = k
        self.first_ED = nn.Parameter(centroids_ED.detach().clone())
        self.second_EE = nn.Parameter(torch.eye(centroids_ED.shape[0]).to(centroids_ED))

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows.
        """
        hidden_NE = _similarities(need_rows(self, x_ND), self.first_ED).tanh()
        logits_NE = linear_scores(hidden_NE, self.second_EE)
        return _unweighted(logits_NE, self.k, 1.0, {"logits": logits_NE})


class OracleRouter(Router):
    """The k slices that fire most on the row: the best choice there is, at the price of the dense FFN (MoEfication).

    Plan: layout "token", all gates one. aux: "scores" [N, E], `pseudo_labels.activation_mass`.

    Args:
        experts: the slices, of the layer that this router serves: `layer.router = OracleRouter(layer.experts, k)`.
        k: slices a row.

    Raises:
        ValueError: k is not within 1..E.
    """

    def __init__(self, experts: Experts, k: int) -> None:
        super().__init__()
        check_k(k, experts.num_experts)
        self.k = k
        # In a tuple, so that the slices are not saved and counted as parameters of the router too.
        self._experts = (experts,)

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows.
        """
        mass_NE = activation_mass(need_rows(self, x_ND), self._experts[0])
        mass_NE = mass_NE.to(torch.promote_types(mass_NE.dtype, torch.float32))
        return _unweighted(mass_NE, self.k, 1.0, {"scores": mass_NE})


class PseudoLabelRouter(LinearRouter):
    """The k slices with the highest scores of a linear map that learns from pseudo-labels alone (FactorLLM).

    Output = E / k times the sum of the chosen slices (Zhao et al., arXiv 2408.11855); the router learns by
    `losses.pseudo_label_loss` towards `pseudo_labels.prior_approximate_labels`.

    Plan: layout "token", all gates E / k. aux: "logits" and "probabilities" [N, E], float32.

    Args:
        d_model: D.
        num_experts: E.
        k: slices a row.

    Raises:
        ValueError: k is not within 1..E.
    """

    def __init__(self, d_model: int, num_experts: int, k: int) -> None:
        super().__init__(d_model, num_experts)
        check_k(k, num_experts)
        self.k = k

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows.
        """
        logits_NE = self.logits(x_ND)
        aux = {"logits": logits_NE, "probabilities": logits_NE.softmax(-1)}
        return _unweighted(logits_NE, self.k, self.num_experts / self.k, aux)


def _similarities(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """Products of x / |x| with W, [N, E]; divided after the product, as E values a row are fewer than D."""
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    length_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=dtype).clamp_min(1e-12)
    return linear_scores(x_ND, weight_ED) / length_N1


def _unweighted(scores_NE: Tensor, k: int, gate: float, aux: dict[str, Tensor]) -> RoutingPlan:
    ids_NK = top_k(scores_NE, k).int()
    gates_NK = scores_NE.detach().new_full(ids_NK.shape, gate)
    return RoutingPlan(ids_NK, gates_NK, scores_NE.shape[-1], aux=aux)
