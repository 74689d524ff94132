"""Layers with every router, and batches for them: what the tests of routers share."""

from collections.abc import Callable

import torch
from torch import Tensor

from mole_asr.moe import (
    AdaptiveRouter,
    CentroidRouter,
    ExpertChoiceRouter,
    ForcedLabelRouter,
    LanguageGroupRouter,
    LanguageRouter,
    MLPRouter,
    MoELayer,
    NoisyTopKRouter,
    OracleRouter,
    PackedRows,
    PseudoLabelRouter,
    Router,
    RoutingContext,
    RoutingPlan,
    TopKRouter,
)
from mole_asr.moe import losses as loss_functions
from mole_asr.moe.experts import GATED, ExpertWeights

D = 6
LENGTHS = [3, 0, 6, 1, 4]


def groups(num_experts: int) -> int:
    return 2 if num_experts % 2 == 0 else 1


# Router of E experts and K of them a row, where the router has a K.
ROUTERS: dict[str, Callable[[int, int], Router]] = {
    "top_k": lambda e, k: TopKRouter(D, e, k, shared_expert=True),
    "top_k_raw": lambda e, k: TopKRouter(D, e, k, renormalize=False, noise_std=0.5),
    "noisy": lambda e, k: NoisyTopKRouter(D, e, k, temperature=0.7),
    "adaptive": lambda e, k: AdaptiveRouter(D, e, 0.1),
    "adaptive_renormalized": lambda e, k: AdaptiveRouter(D, e, 0.3, renormalize=True, shared_expert=True),
    "expert_choice": lambda e, k: ExpertChoiceRouter(D, e, k),
    "language": lambda e, k: LanguageRouter(e),
    "language_frame": lambda e, k: LanguageRouter(e, "entropy"),
    "language_gumbel": lambda e, k: LanguageRouter(e, "gumbel"),
    "family": lambda e, k: LanguageRouter(2 * e, families=[*range(e), *range(e)]),
    "language_generations": lambda e, k: LanguageRouter(2 * e, families=[*range(e), *range(e)], parts=(e, e)),
    "group": lambda e, k: LanguageGroupRouter(D, groups(e), e // groups(e), min(k, e // groups(e))),
    "group_frame": lambda e, k: LanguageGroupRouter(D, groups(e), e // groups(e), 1, renormalize=False),
    "forced": lambda e, k: ForcedLabelRouter(D, e, max(k, min(2, e))),
    "centroid": lambda e, k: CentroidRouter(torch.randn(e, D), k),
    "mlp": lambda e, k: MLPRouter(torch.randn(e, D), k),
    "oracle": lambda e, k: OracleRouter(make_layer("top_k", e, k).experts, k),  # replaced by that of its layer
    "pseudo_label": lambda e, k: PseudoLabelRouter(D, e, k),
}
FRAME_LOGITS = {"language_frame", "group_frame"}
SEGMENTS = {"language", "language_gumbel", "family", "language_generations"}


def make_layer(name: str, num_experts: int = 4, k: int = 2) -> MoELayer:
    router = ROUTERS[name](num_experts, k)
    layer = MoELayer(D, 5, num_experts, router, shared_expert=True).double()
    if name == "oracle":
        layer.router = OracleRouter(layer.experts, k)
    if name == "noisy":
        torch.nn.init.normal_(router.noise.weight)
    return layer


class Batch:
    """A padded batch, and what a router may look at."""

    def __init__(self, name: str, layer: MoELayer, lengths: list[int], seed: int = 0) -> None:
        draws = torch.Generator().manual_seed(seed)
        num_languages = getattr(layer.router, "num_languages", layer.experts.num_experts)
        batch, frames = len(lengths), max(lengths, default=0)
        shape = (batch, frames, num_languages) if name in FRAME_LOGITS else (batch, num_languages)
        self.lengths_B = torch.tensor(lengths, dtype=torch.long)
        self.x_BTD = torch.randn(batch, frames, D, generator=draws, dtype=torch.float64)
        self.logits = torch.randn(shape, generator=draws, dtype=torch.float64)
        self.languages_B = torch.randint(-1, num_languages, (batch,), generator=draws)

    def padding(self) -> Tensor:
        return torch.arange(self.x_BTD.shape[1]) >= self.lengths_B[:, None]

    def context(self, seed: int = 1) -> RoutingContext:
        rows = PackedRows.from_lengths(self.lengths_B, self.x_BTD.shape[1])
        return RoutingContext(rows, self.logits, self.languages_B, generator=torch.Generator().manual_seed(seed))

    def run(self, layer: MoELayer, backend: str = "auto") -> tuple[Tensor, RoutingPlan]:
        layer.backend = backend
        context = self.context()
        return layer(self.x_BTD, rows=context.rows, context=context)

    def gradients(self, layer: MoELayer, backend: str = "auto") -> dict[str, Tensor]:
        """The output, and the gradient of a lopsided loss in rows, language logits and parameters."""
        self.x_BTD, self.logits = (t.detach().requires_grad_() for t in (self.x_BTD, self.logits))
        y_BTD, _ = self.run(layer, backend)
        inputs = {"x": self.x_BTD, "language_logits": self.logits, **dict(layer.named_parameters())}
        weights = torch.linspace(-1, 2, y_BTD.numel(), dtype=torch.float64).view_as(y_BTD)
        total = (y_BTD * weights).sum() + 0 * sum(i.sum() for i in inputs.values())
        found = torch.autograd.grad(total, list(inputs.values()))
        return {"output": y_BTD, **dict(zip(inputs, found, strict=True))}


def backends(name: str) -> list[str]:
    return ["cpu_tiled", "segment"] if name in SEGMENTS else ["cpu_tiled"]


def losses_of(plan: RoutingPlan) -> dict[str, Tensor]:
    """Every loss that this plan has what is needed for."""
    found = {"importance": loss_functions.importance_loss(plan), "load": loss_functions.load_loss(plan)}
    if "probabilities" in plan.aux:
        found["balance"] = loss_functions.load_balance_loss(plan)
        found["balance_alone"] = loss_functions.load_balance_loss(plan, one_expert_only=True)
    if "logits" in plan.aux:
        found["z"] = loss_functions.router_z_loss(plan)
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: float) -> None:
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


# Does the output's gradient reach (the router's parameters, the language logits)?
REACHES = {
    "top_k": (True, False),
    "top_k_raw": (True, False),
    "noisy": (True, False),
    "adaptive": (True, False),
    "adaptive_renormalized": (True, False),
    "expert_choice": (True, False),
    "language": (False, True),
    "language_frame": (False, True),
    "language_gumbel": (False, True),
    "family": (False, True),
    "language_generations": (False, True),
    "group": (True, False),  # DLG-MoE: the language posterior never weighs the output
    "group_frame": (True, False),
    "forced": (True, False),
    "centroid": (False, False),
    "mlp": (False, False),
    "oracle": (False, False),
    "pseudo_label": (False, False),
}


def dense_ffn(activation: str = "relu", d_model: int = 6, d_ff: int = 24, bias: bool = True) -> ExpertWeights:
    """A dense FFN in float64."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    up = 2 * d_ff if activation in GATED else d_ff
    return ExpertWeights(
        draw(up, d_model), draw(up) if bias else None, draw(d_model, d_ff), draw(d_model) if bias else None
    )
