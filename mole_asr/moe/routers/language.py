"""One language expert and the agnostic one, mixed by reliability: the router of MoLE.

Shape letters: B utterances, T frames, N languages where logits are meant (BN, BTN) and else rows (ND), U units
(utterances or valid frames), E experts.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.moe.parts import choose
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers.base import Router, RoutingContext
from mole_asr.moe.routers.families import Families

Reliability = Literal["max_posterior", "entropy", "sigmoid", "gumbel", "one", "zero"]


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

    Where the context says the language of an utterance, that is routed by, else the predicted one.

    With `families`, several languages share an expert (Post-MoE, arXiv 2410.10626): the posterior of a family is the
    sum of its languages' posteriors, and l and N above are of families. Labels stay labels of languages.

    The rows are not looked at, so one plan serves all layers: call it once, `router(None, context)`.

    With `parts`, the languages came in generations: the posterior of an utterance in an old language, given or heard,
    is over its own and older generations (in training over all), so that later ones do not change it. With `kept`,
    only these languages may be routed to and only their experts exist; the others still take their share of the
    posterior, so that r is what it was with all experts.

    Plan: layout "segment" for logits [B, N], else "token". aux: "logits" [U, N] and "probabilities" [U, E] (float32,
    without padding), "reliability" [U], "predicted" int64 [U], the expert chosen where labels and noise are ignored.

    Args:
        num_languages: N.
        reliability: see above.
        temperature: of the softmax, positive.
        families: for each language its expert; None where language n has expert n.
        parts: languages of each generation, adding up to N; None for one.
        kept: languages that are left, ascending; labels are indices into them. None for all.

    Raises:
        ValueError: an unknown name, a temperature that is not positive, or families or parts that do not fit.
    """

    kept_experts_E: Tensor | None
    kept_languages_K: Tensor | None
    generation_K: Tensor

    def __init__(
        self,
        num_languages: int,
        reliability: Reliability = "max_posterior",
        temperature: float = 1.0,
        families: Sequence[int] | None = None,
        parts: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if reliability not in get_args(Reliability):
            raise ValueError(f"reliability must be one of {', '.join(get_args(Reliability))}, not {reliability!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        if families is not None and len(families) != num_languages:
            raise ValueError(f"families must name the expert of each of {num_languages} languages, not {len(families)}")
        if parts is not None and (sum(parts) != num_languages or parts[0] < 1):
            raise ValueError(f"parts must add up to {num_languages} languages, not {sum(parts)}")
        self.num_languages, self.temperature = num_languages, temperature
        self.families = None if families is None else Families(families)
        self.parts = tuple(parts or (num_languages,))
        experts = list(range(num_languages) if families is None else families)
        self._ends = list(accumulate(self.parts))
        if any(sorted(set(experts[:end])) != list(range(len(set(experts[:end])))) for end in self._ends):
            raise ValueError(f"families must be numbered in the order in which their languages came, not {experts}")
        languages = list(range(num_languages) if kept is None else kept)
        left = sorted({experts[language] for language in languages})
        self.num_experts = len(left)
        generations = [n for n, count in enumerate(self.parts) for _ in range(count)]
        places = [left.index(experts[language]) for language in languages]
        self.families_of_labels = self.families if kept is None else Families(places)
        self.register_buffer("kept_experts_E", None if kept is None else torch.tensor(left), persistent=False)
        self.register_buffer("kept_languages_K", None if kept is None else torch.tensor(languages), persistent=False)
        self.register_buffer("generation_K", torch.tensor(generations)[languages], persistent=False)
        self.reliability: Reliability = reliability

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of a batch; `x_ND` is not looked at.

        Raises:
            ValueError: the context lacks what this router needs, or its shapes do not fit.
        """
        logits_UN = language_logits_of(self, context, self.num_languages)
        assert context is not None
        newest_U = self.newest(logits_UN, context)
        scaled_UN = logits_UN / self.temperature
        scaled_of = [scaled_UN[:, :end] for end in ([self.num_languages] if newest_U is None else self._ends)]
        if self.families is not None:
            scaled_of = [self.families.logits(scaled_Un) for scaled_Un in scaled_of]
        p_of = [scaled_Ue.softmax(-1) for scaled_Ue in scaled_of]  # of each generation: [U, experts so far]
        sizes = [(0, p_of[-1].shape[1] - p_Ue.shape[1]) for p_Ue in p_of]
        p_UE = choose([functional.pad(p_Ue, size) for p_Ue, size in zip(p_of, sizes, strict=True)], newest_U)
        p_UE = p_UE if self.kept_experts_E is None else p_UE[:, self.kept_experts_E]
        predicted_U = p_UE.argmax(-1)
        noisy_UE = self._gumbel_sample(scaled_of[-1], context.generator)
        if noisy_UE is not None and self.kept_experts_E is not None:
            noisy_UE = noisy_UE[:, self.kept_experts_E]
        drawn_U = predicted_U if noisy_UE is None else noisy_UE.argmax(-1)
        expert_U = routed_language(drawn_U, context, self.families_of_labels)
        if self.reliability == "entropy":
            r_U = choose([_certainty(p_Ue) for p_Ue in p_of], newest_U)
        else:
            r_U = self._reliability(p_UE, expert_U, noisy_UE, context)
        aux = {"logits": logits_UN, "probabilities": p_UE, "reliability": r_U, "predicted": predicted_U}
        return self._plan(expert_U, r_U, context, aux)

    def newest(self, logits_UN: Tensor, context: RoutingContext) -> Tensor | None:
        """The newest generation that counts for each unit: that of its language, given or heard; None where all do."""
        if self.training or len(self.parts) == 1:
            return None
        own_UK = logits_UN if self.kept_languages_K is None else logits_UN[:, self.kept_languages_K]
        return self.generation_K[routed_language(own_UK.argmax(-1), context)]

    def _gumbel_sample(self, scaled_UE: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """A soft sample of the language in training with the reliability "gumbel", else None."""
        if self.reliability != "gumbel" or not self.training:
            return None
        uniform_UE = torch.rand(scaled_UE.shape, generator=generator, device=scaled_UE.device)
        noise_UE = -torch.log(-torch.log(uniform_UE.clamp(1e-9, 1 - 1e-7)))
        return (scaled_UE + noise_UE).softmax(-1)

    def _reliability(self, p_UE: Tensor, expert_U: Tensor, noisy_UE: Tensor | None, context: RoutingContext) -> Tensor:
        if self.reliability in ("one", "zero"):
            return p_UE.new_full(expert_U.shape, float(self.reliability == "one"))
        if self.reliability == "sigmoid":
            if context.reliability_logits is None:
                raise ValueError("the reliability 'sigmoid' needs reliability_logits in the context")
            return units_of(context, context.reliability_logits, "reliability_logits").to(p_UE.dtype).sigmoid()
        r_U = p_UE.gather(-1, expert_U[:, None]).squeeze(-1)
        if noisy_UE is None:
            return r_U
        soft_U = noisy_UE.gather(-1, expert_U[:, None]).squeeze(-1)
        return r_U * (1 + soft_U - soft_U.detach())

    def _plan(self, expert_U: Tensor, r_U: Tensor, context: RoutingContext, aux: dict[str, Tensor]) -> RoutingPlan:
        only_shared, only_language = self.reliability == "zero", self.reliability == "one"
        ids_U = torch.full_like(expert_U, self.num_experts) if only_shared else expert_U
        return RoutingPlan(
            expert_ids=ids_U.int()[:, None],
            gates=r_U[:, None],
            num_experts=self.num_experts,
            layout="token" if context.by_frame else "segment",
            segments=None if context.by_frame else context.rows.segments_B1,
            shared_gates=None if only_language else 1 - r_U,
            aux=aux,
        )


def _certainty(p_UE: Tensor) -> Tensor:
    """The reliability "entropy" of each unit: 1 - H(p) / log E."""
    if p_UE.shape[1] == 1:
        return p_UE[:, 0]
    # A probability of zero has no entropy, but it must not have an infinite gradient either.
    entropy_U = -(p_UE * p_UE.clamp(min=torch.finfo(p_UE.dtype).tiny).log()).sum(-1)
    return 1 - entropy_U / math.log(p_UE.shape[1])


def units_of(context: RoutingContext, values: Tensor, name: str) -> Tensor:
    """The values [B, ...] of each utterance as they are, or of the valid frames of [B, T, ...]."""
    if values.shape[0] != context.rows.lengths_B.numel():
        raise ValueError(f"{name} must have {context.rows.lengths_B.numel()} utterances, not {values.shape[0]}")
    return context.rows.pack(values) if context.by_frame else values


def language_logits_of(router: Router, context: RoutingContext | None, num_languages: int) -> Tensor:
    """The language logits [U, N] of each utterance or valid frame, in float32 or float64.

    Raises:
        ValueError: the context has none, or they do not fit.
    """
    if context is None or context.language_logits is None:
        raise ValueError(f"{type(router).__name__} needs a context with language_logits")
    logits_UN = units_of(context, context.language_logits, "language_logits")
    if logits_UN.shape[-1] != num_languages:
        raise ValueError(f"language_logits must be for {num_languages} languages, not {logits_UN.shape[-1]}")
    return logits_UN.to(torch.promote_types(logits_UN.dtype, torch.float32))


def routed_language(predicted_U: Tensor, context: RoutingContext, families: Families | None = None) -> Tensor:
    """The language (or family) that each unit is routed by: that of the context, or the predicted one.

    Args:
        predicted_U: what to take where the context names none.
        context: may have languages.
        families: turns such a language into its family.
    """
    if context.languages_B is None:
        return predicted_U
    labels_B = context.languages_B.to(predicted_U.device).long()
    labels_B = labels_B if families is None else families.of(labels_B)
    labels_U = labels_B[context.rows.utterance_of_row] if context.by_frame else labels_B
    return labels_U.where(labels_U >= 0, predicted_U)
