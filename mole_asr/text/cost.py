"""What one token costs."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from mole_asr.moe.layer import MoELayer
from mole_asr.moe.routers import CentroidRouter, LinearRouter, Router
from mole_asr.moe.statistics import expert_cost
from mole_asr.text.model import TextModel


@dataclass(frozen=True)
class TokenCost:
    """Size of a model and forward work of a token: products alone, a multiplication and an addition counting as two.

    Attributes:
        total_parameters: of the whole model.
        active_parameters: those that compute one token, all of the embedding (it gives the logits too) among them.
        feed_forward_flops: of the feed-forward parts, dense or experts with their routers, but for what oracles see:
            they compute all slices, and are for comparison, not for use.
        flops: of everything.
    """

    total_parameters: int
    active_parameters: float
    feed_forward_flops: float
    flops: float


def token_cost(model: TextModel, window: int, experts_per_token: dict[int, float]) -> TokenCost:
    """Counts a model.

    Args:
        model: to count.
        window: T; attention of a decoder looks at (T + 1) / 2 tokens on average, that of an encoder at T.
        experts_per_token: by layer, for those that have experts; `LayerFigures.experts_per_token`.
    """
    D = model.config.d_model
    total = _count(model)
    active = float(total)
    feed_forward = 0.0
    unused: dict[Router, int] = {}  # layers may share a router, which `total` counts once
    for layer, block in enumerate(model.blocks):
        part: Any = block.feed_forward
        if isinstance(part, MoELayer):
            cost = expert_cost(part.experts, experts_per_token[layer])
            active -= cost.total_parameters - cost.active_parameters
            feed_forward += cost.flops_per_row
            if part.router is not None:
                used = _used(part.router)
                unused[part.router] = _count(part.router) - used
                centroids = part.router.centroids_ED.numel() if isinstance(part.router, CentroidRouter) else 0
                feed_forward += 2 * (used + centroids)
        else:
            feed_forward += 2 * _count(part)
    active -= sum(unused.values())
    seen = (window + 1) / 2 if model.config.causal else window
    attention = model.config.num_layers * (2 * 4 * D * D + 2 * 2 * D * seen)
    logits = 2 * D * model.vocab_size
    return TokenCost(total, active, feed_forward, feed_forward + attention + logits)


def _used(router: Router) -> int:
    """Parameters of a router that choose at inference; a map of its noise, say, is for training alone."""
    return _count(router.scores if isinstance(router, LinearRouter) else router)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
