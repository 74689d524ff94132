"""What every router is called like, and the small functions that routers share.

Shape letters: B utterances, T frames, N rows (languages as the last letter of logits), E experts, K experts a row,
D model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.rows import PackedRows


@dataclass(frozen=True, eq=False)
class RoutingContext:
    """What a router may look at beside the rows; on the rows' device, else each call waits for a copy.

    Attributes:
        rows: the packing of the batch.
        language_logits: [B, N] for one decision an utterance, or [B, T, N] for one a frame.
        languages_B: the languages to route by, -1 where the router is to take the one that it predicts.
        reliability_logits: [B] or [B, T], of a head of its own; for the reliability "sigmoid".
        generator: draws all noise; None for torch's own.
    """

    rows: PackedRows
    language_logits: Tensor | None = None
    languages_B: Tensor | None = None
    reliability_logits: Tensor | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the number of labels."""
        utterances = self.rows.lengths_B.numel()
        if self.languages_B is not None and self.languages_B.shape != (utterances,):
            raise ValueError(f"languages_B must hold {utterances} labels, not {tuple(self.languages_B.shape)}")

    @property
    def by_frame(self) -> bool:
        """Whether the language is decided a frame, and not an utterance."""
        return self.language_logits is not None and self.language_logits.dim() == 3


class Router(nn.Module):
    """Rows and a context in, a `RoutingPlan` out. A router computes no expert and never waits for the device.

    Its decisions are made in float32 (float64 where rows or weights are), also under autocast.

    One router may serve several layers (Omni-router, arXiv 2507.05724): give the same object to each `MoELayer`, and
    each routes its own rows with the shared weights. The state dict then names these weights once a layer: save such a
    model with `safetensors.torch.save_model` and read it with `load_model`, which keep one copy (`save_file` refuses).
    To share the decision too, make one plan and give it to all layers.
    """

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan for these rows."""
        raise NotImplementedError


class LinearRouter(Router):
    """A router whose scores are a linear map of the row.

    Args:
        d_model: D.
        num_experts: E, without the shared expert.
        shared_expert: whether the plan adds the layer's shared expert, with weight one.
    """

    def __init__(self, d_model: int, num_experts: int, shared_expert: bool = False) -> None:
        super().__init__()
        self.num_experts, self.shared_expert = num_experts, shared_expert
        self.scores = nn.Linear(d_model, num_experts, bias=False)

    def logits(self, x_ND: Tensor | None) -> Tensor:
        """The scores of all experts.

        Raises:
            ValueError: no rows.
        """
        return linear_scores(need_rows(self, x_ND), self.scores.weight)

    def plan(self, ids_NK: Tensor, gates_NK: Tensor, aux: dict[str, Tensor]) -> RoutingPlan:
        """A plan a row, with the shared expert where there is one."""
        shared_N = gates_NK.new_ones(gates_NK.shape[0]) if self.shared_expert else None
        return RoutingPlan(ids_NK.int(), gates_NK, self.num_experts, shared_gates=shared_N, aux=aux)


def need_rows(router: Router, x_ND: Tensor | None) -> Tensor:
    """The rows, or a clear error where there are none."""
    if x_ND is None:
        raise ValueError(f"{type(router).__name__} needs rows")
    return x_ND


def check_k(k: int, num_experts: int) -> None:
    """Refuse a K that the experts cannot serve."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must lie in 1..{num_experts}, the number of experts, not {k}")


def linear_scores(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """Scores [N, E] = x W^T in float32 (float64 where one of the two is), also under autocast."""
    dtype = torch.promote_types(torch.promote_types(x_ND.dtype, weight_ED.dtype), torch.float32)
    with torch.autocast(x_ND.device.type, enabled=False):
        return functional.linear(x_ND.to(dtype), weight_ED.to(dtype))


def top_k(scores_NE: Tensor, k: int) -> Tensor:
    """The k experts (int64 [N, K]) with the highest scores, the highest first; for k <= 2, of equal ones the first."""
    scores_NE = scores_NE.detach()
    if k > 2:
        return scores_NE.topk(k, dim=-1).indices
    # Two maxima cost a half to a quarter of what topk does.
    first_N1 = scores_NE.max(dim=-1, keepdim=True).indices
    if k == 1:
        return first_N1
    second_N1 = scores_NE.scatter(-1, first_N1, -torch.inf).max(dim=-1, keepdim=True).indices
    return torch.cat([first_N1, second_N1], dim=-1)


def gates_of(scores_NE: Tensor, ids_NK: Tensor, renormalize: bool) -> Tensor:
    """Weights of the chosen experts: softmax over the chosen ones, or, raw, over all experts."""
    if renormalize:
        return scores_NE.gather(-1, ids_NK).softmax(-1)
    return scores_NE.softmax(-1).gather(-1, ids_NK)
