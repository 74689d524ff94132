"""Policies: who computes what. A router takes rows and a context and gives a `RoutingPlan`; it computes no expert.

Shape letters: B utterances, T frames, N languages where logits are meant (BN, BTN) and else rows (ND), U units
(utterances or valid frames), E experts, K experts a row, D model width.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.rows import PackedRows

Reliability = Literal["max_posterior", "entropy", "sigmoid", "gumbel", "one", "zero"]
Routing = Literal["predicted", "true", "scheduled"]


@dataclass(frozen=True, eq=False)
class RoutingContext:
    """What a router may look at beside the rows.

    Attributes:
        rows: the packing of the batch.
        language_logits: [B, N] for one decision an utterance, or [B, T, N] for one a frame.
        languages_B: true languages, -1 where unknown.
        true_probability: with the routing "scheduled", the share of utterances routed by their true language.
        reliability_logits: [B] or [B, T], of a head of its own; for the reliability "sigmoid".
        routing: replaces the router's own routing in this call: "true" makes it use the languages given here.
        generator: draws the schedule and the Gumbel noise; None for torch's own.
    """

    rows: PackedRows
    language_logits: Tensor | None = None
    languages_B: Tensor | None = None
    true_probability: float = 1.0
    reliability_logits: Tensor | None = None
    routing: Routing | None = None
    generator: torch.Generator | None = None


class Router(nn.Module):
    """What every router is called like."""

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan for these rows."""
        raise NotImplementedError


class LanguageRouter(Router):
    """One language expert, chosen by a language tokenizer, and the agnostic expert, mixed by reliability.

    MoLE's published text says that a light language tokenizer activates one language-specific expert, estimates how
    reliable that is, and that the expert and a language-agnostic one are aggregated by this reliability. The formulas
    here are our interpretation of it: with logits z, p = softmax(z / temperature), l = argmax p, and
    y = r * expert_l(x) + (1 - r) * shared(x). Although the argmax is hard, r carries the recognition loss's gradient
    to the logits. The reliability r of the routed language l is one of

    - "max_posterior": r = p[l];
    - "entropy": r = 1 - H(p) / log N;
    - "sigmoid": r = sigmoid of a logit of its own, to be trained with `losses.reliability_loss`;
    - "gumbel": l is drawn with Gumbel noise in training; r = p[l], times a straight-through weight that is 1 in the
      forward and has the gradient of the soft sample;
    - "one", "zero": ablations, only the language expert or only the agnostic one, without computing the other.

    The routed language is the predicted one, the true one, or ("scheduled", in training only) the true one for a
    random share of the utterances. Where the true language is unknown, the prediction is taken.

    The rows are not looked at, so one plan serves all layers: call it once, `router(None, context)`.

    Plan: layout "segment" for logits [B, N], else "token". aux: "logits" and "probabilities" [U, N] (float32, without
    padding), "reliability" [U], "predicted" int64 [U].

    Args:
        num_languages: N; language n has expert n.
        reliability: see above.
        temperature: of the softmax, positive.
        routing: "predicted", "true" or "scheduled".

    Raises:
        ValueError: an unknown name or a temperature that is not positive.
    """

    def __init__(
        self,
        num_languages: int,
        reliability: Reliability = "max_posterior",
        temperature: float = 1.0,
        routing: Routing = "predicted",
    ) -> None:
        super().__init__()
        if reliability not in get_args(Reliability):
            raise ValueError(f"reliability must be one of {', '.join(get_args(Reliability))}, not {reliability!r}")
        if routing not in get_args(Routing):
            raise ValueError(f"routing must be one of {', '.join(get_args(Routing))}, not {routing!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.num_languages, self.temperature = num_languages, temperature
        self.reliability: Reliability = reliability
        self.routing: Routing = routing

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of a batch; `x_ND` is not looked at.

        Raises:
            ValueError: the context lacks what this router needs, or its shapes do not fit.
        """
        if context is None or context.language_logits is None:
            raise ValueError("LanguageRouter needs a context with language_logits")
        logits_UN = self._units(context, context.language_logits, "language_logits")
        logits_UN = logits_UN.to(torch.promote_types(logits_UN.dtype, torch.float32))
        if logits_UN.shape[-1] != self.num_languages:
            raise ValueError(f"language_logits must be for {self.num_languages} languages, not {logits_UN.shape[-1]}")
        scaled_UN = logits_UN / self.temperature
        p_UN = scaled_UN.softmax(-1)
        predicted_U = p_UN.argmax(-1)
        noisy_UN = self._gumbel_sample(scaled_UN, context.generator)
        language_U = self._choose(predicted_U if noisy_UN is None else noisy_UN.argmax(-1), context)
        r_U = self._reliability(p_UN, language_U, noisy_UN, context)
        aux = {"logits": logits_UN, "probabilities": p_UN, "reliability": r_U, "predicted": predicted_U}
        return self._plan(language_U, r_U, context, aux)

    def _units(self, context: RoutingContext, values: Tensor, name: str) -> Tensor:
        """[B, ...] as it is, or the valid frames of [B, T, ...]."""
        per_frame = context.language_logits is not None and context.language_logits.dim() == 3
        if values.shape[0] != context.rows.lengths_B.numel():
            raise ValueError(f"{name} must have {context.rows.lengths_B.numel()} utterances, not {values.shape[0]}")
        return context.rows.pack(values) if per_frame else values

    def _gumbel_sample(self, scaled_UN: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """A soft sample of the language in training with the reliability "gumbel", else None."""
        if self.reliability != "gumbel" or not self.training:
            return None
        uniform_UN = torch.rand(scaled_UN.shape, generator=generator, device=scaled_UN.device)
        noise_UN = -torch.log(-torch.log(uniform_UN.clamp(1e-9, 1 - 1e-7)))
        return (scaled_UN + noise_UN).softmax(-1)

    def _choose(self, predicted_U: Tensor, context: RoutingContext) -> Tensor:
        """The routed language of each unit, by the routing of this router or of this call."""
        routing = context.routing or self.routing
        if routing == "scheduled" and not self.training:
            routing = "predicted"
        if routing == "predicted" or context.languages_B is None:
            return predicted_U
        labels_B = context.languages_B.to(predicted_U.device).long()
        if routing == "scheduled":
            chance_B = torch.rand(labels_B.shape, generator=context.generator, device=labels_B.device)
            labels_B = labels_B.where(chance_B < context.true_probability, -1)
        assert context.language_logits is not None
        labels_U = labels_B if context.language_logits.dim() == 2 else labels_B[context.rows.utterance_of_row]
        return labels_U.where(labels_U >= 0, predicted_U)

    def _reliability(
        self, p_UN: Tensor, language_U: Tensor, noisy_UN: Tensor | None, context: RoutingContext
    ) -> Tensor:
        if self.reliability in ("one", "zero"):
            return p_UN.new_full(language_U.shape, float(self.reliability == "one"))
        if self.reliability == "sigmoid":
            if context.reliability_logits is None:
                raise ValueError("the reliability 'sigmoid' needs reliability_logits in the context")
            return self._units(context, context.reliability_logits, "reliability_logits").to(p_UN.dtype).sigmoid()
        if self.reliability == "entropy" and self.num_languages > 1:
            entropy_U = torch.special.entr(p_UN).sum(-1)
            return 1 - entropy_U / math.log(self.num_languages)
        r_U = p_UN.gather(-1, language_U[:, None]).squeeze(-1)
        if noisy_UN is None:
            return r_U
        soft_U = noisy_UN.gather(-1, language_U[:, None]).squeeze(-1)
        return r_U * (1 + soft_U - soft_U.detach())

    def _plan(self, language_U: Tensor, r_U: Tensor, context: RoutingContext, aux: dict[str, Tensor]) -> RoutingPlan:
        only_shared, only_language = self.reliability == "zero", self.reliability == "one"
        ids_U = torch.full_like(language_U, self.num_languages) if only_shared else language_U
        assert context.language_logits is not None
        by_utterance = context.language_logits.dim() == 2
        return RoutingPlan(
            expert_ids=ids_U.int()[:, None],
            gates=r_U[:, None],
            num_experts=self.num_languages,
            layout="segment" if by_utterance else "token",
            segments=context.rows.segments_B1 if by_utterance else None,
            shared_gates=None if only_language else 1 - r_U,
            aux=aux,
        )


class TopKRouter(Router):
    """The k experts with the highest scores of a linear map of the row, weighted by their softmax.

    Plan: layout "token". aux: "logits" and "probabilities" [N, E], float32.

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

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        k: int,
        renormalize: bool = True,
        noise_std: float = 0.0,
        shared_expert: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must lie in 1..{num_experts}, the number of experts, not {k}")
        self.num_experts, self.k, self.renormalize = num_experts, k, renormalize
        self.noise_std, self.shared_expert = noise_std, shared_expert
        self.scores = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows; scores are computed in float32 (or float64), also under autocast.

        Raises:
            ValueError: no rows.
        """
        if x_ND is None:
            raise ValueError("TopKRouter needs rows")
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = self.scores(x_ND.to(self.scores.weight.dtype))
        chosen_by_NE = logits_NE
        if self.training and self.noise_std > 0:
            generator = None if context is None else context.generator
            noise_NE = torch.randn(logits_NE.shape, generator=generator, device=logits_NE.device)
            chosen_by_NE = logits_NE + self.noise_std * noise_NE
        top_NK, ids_NK = chosen_by_NE.topk(self.k, dim=-1)
        p_NE = chosen_by_NE.softmax(-1)
        gates_NK = top_NK.softmax(-1) if self.renormalize else p_NE.gather(-1, ids_NK)
        shared_N = gates_NK.new_ones(x_ND.shape[0]) if self.shared_expert else None
        aux = {"logits": logits_NE, "probabilities": p_NE}
        return RoutingPlan(ids_NK.int(), gates_NK, self.num_experts, shared_gates=shared_N, aux=aux)
