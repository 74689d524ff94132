"""Who computes what in the upper blocks: the language tokenizer, the routers and the layers of experts.

It stands on any encoder that has a stream of frames: the Conformer of `model.py`, or a pretrained one. The encoder
calls an `ExpertMixture` once, behind an early layer, and hands the `Decision` it gets to its `MixtureFeedForward`s.

Letters: B batch, T frames, D model width, N languages, F expert width, U units (utterances or valid frames).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from mole_asr.asr.language_tokenizer import LanguageEvidence, LanguageTokenizer
from mole_asr.audio.features import valid_mask
from mole_asr.corpus.families import KIN, expert_names
from mole_asr.errors import MoleError
from mole_asr.moe.experts import Activation
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers import (
    Families,
    ForcedLabelRouter,
    LanguageGroupRouter,
    LanguageRouter,
    Reliability,
    Router,
    RoutingContext,
    TopKRouter,
)
from mole_asr.moe.routers.language import routed_language, units_of
from mole_asr.moe.rows import PackedRows

Mixture = Literal["language", "group", "forced", "switch", "omni", "dense"]
Routing = Literal["predicted", "true", "scheduled"]


@dataclass(frozen=True)
class MixtureConfig:
    """What the upper blocks are: MoLE, one of its rivals, or dense.

    Attributes:
        mixture: who chooses the experts of the MoLE blocks. "language": the language tokenizer, mixed with an agnostic
            expert by reliability (MoLE), or alone (reliability "one"; with routing_unit "frame" that is LR-MoE, arXiv
            2307.05956). "group": the language tokenizer a group of experts, and a router of the layer the best in it
            (DLG-MoE, arXiv 2407.18581). "forced": a router of the layer, in training always with the expert of the
            language among the chosen (Post-MoE, arXiv 2410.10626). "switch": a router of the layer (Switch, arXiv
            2101.03961). "omni": one router for all layers (Omni-router, arXiv 2507.05724). "dense": nobody; there is
            one feed-forward part.
        expert_d_ff: width of each expert, or of the one feed-forward part; null: that of the other feed-forward parts.
        expert_of: with "language" and "forced": "language" gives each language an expert of its own, "family" and
            "branch" each close or wide kin (`corpus/families.py`); or, for each language, a name: those of one name
            share an expert.
        num_experts: with "switch" and "omni" the experts of a layer, with "group" those of a language.
        top_k: with "switch", "omni", "group" and "forced" (at least 2 there), how many of them compute a frame.
        routing_unit: "utterance" or "frame" (for code-switching): what the language is decided for.
        reliability: definition of r: "max_posterior", "entropy", "sigmoid" or "gumbel"; "one" and "zero" are ablations.
        temperature: of the language posterior.
        routing: by which language in training: "predicted", "true" or "scheduled", from the true to the predicted one;
            the routers of "forced" are always shown the true one.
        language_probe: the language tokenizer only listens: its losses do not shape the encoder.
        language_embedding: adds a learned vector of the language to the stream, behind the language tokenizer: the true
            language with routing "true" (an oracle), and where none is given the predicted one. Not with "forced".
    """

    section: ClassVar[str] = "model.encoder"  # where users write these keys

    mixture: Mixture = "language"
    expert_d_ff: int | None = None
    expert_of: str | dict[str, str] = "language"
    num_experts: int = 5
    top_k: int = 1
    routing_unit: str = "utterance"
    reliability: Reliability = "max_posterior"
    temperature: float = 1.0
    routing: Routing = "scheduled"
    language_probe: bool = False
    language_embedding: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            MoleError: one is wrong; the message names it.
        """
        families = self.expert_of if isinstance(self.expert_of, str) else "language"
        problems = [
            (self.mixture not in get_args(Mixture), f"mixture: {self.mixture!r} is unknown"),
            (
                self.expert_d_ff is not None and self.expert_d_ff < 1,
                f"expert_d_ff: {self.expert_d_ff} must be positive",
            ),
            (families not in ("language", *KIN), f"expert_of: {self.expert_of!r} is unknown"),
            (
                self.mixture != "forced" and not 1 <= self.top_k <= self.num_experts,  # whose experts are the languages
                f"top_k: {self.top_k} must be 1..{self.num_experts}, the num_experts",
            ),
            (self.routing_unit not in ("utterance", "frame"), f"routing_unit: {self.routing_unit!r} is unknown"),
            (self.routing not in get_args(Routing), f"routing: {self.routing!r} is unknown"),
            (
                self.language_embedding and self.mixture == "forced",
                'language_embedding: is not for the mixture "forced", whose routers see the language',
            ),
            (not 0 < self.temperature < math.inf, f"temperature: {self.temperature:g} must be positive"),
        ]
        self.refuse(problems)

    @classmethod
    def refuse(cls, problems: list[tuple[bool, str]]) -> None:
        """Raises a MoleError for the first (is wrong, message) that is wrong."""
        for is_wrong, message in problems:
            if is_wrong:
                raise MoleError(f"{cls.section}.{message}; change it in the config")

    def spelled_out(self, languages: list[str]) -> Self:
        """The same config with the expert of each language named, so that it does not depend on our table."""
        if self.expert_of == "language":
            return self
        return replace(self, expert_of=dict(zip(languages, expert_names(self.expert_of, languages), strict=True)))


@dataclass(frozen=True)
class PaddedFrames:
    """Which frames of a padded batch are valid, worked out once.

    Attributes:
        lengths_B: int64.
        valid_BT: bool.
        rows: the packing of the valid frames.
    """

    lengths_B: Tensor
    valid_BT: Tensor
    rows: PackedRows

    @classmethod
    def of_lengths(cls, lengths_B: Tensor, size: int) -> "PaddedFrames":
        """Describes a batch of utterances padded to `size` frames."""
        return PaddedFrames(lengths_B, valid_mask(lengths_B, size), PackedRows.from_lengths(lengths_B, size))


@dataclass(frozen=True, eq=False)
class Decision:
    """What the language tokenizer heard, and what follows for the layers of experts.

    Attributes:
        evidence: of the language tokenizer.
        heard: the language and the reliability that were decided on (`aux`), whether or not they choose experts.
        context: for routers that look at frames.
        plan: for all layers; None where layers route their own frames.
        router: of all layers ("omni").
        families: which languages share an expert; None where none do.
        newest_B: int64, the newest generation of pieces that each utterance's language may use; None for all.
        balances: whether routers choose experts without labels, so that a loss must see to an even load.
        plans: what each layer did, lowest first; the layers fill it.
    """

    evidence: LanguageEvidence
    heard: RoutingPlan
    context: RoutingContext
    plan: RoutingPlan | None = None
    router: Router | None = None
    families: Families | None = None
    newest_B: Tensor | None = None
    balances: bool = False
    plans: list[RoutingPlan] = field(default_factory=list)

    @property
    def reliability_B(self) -> Tensor:
        """float32 r of each utterance; the mean over its frames where the language is decided a frame."""
        r_U, rows = self.heard.aux["reliability"].float(), self.context.rows
        if not self.context.by_frame:
            return r_U
        return self._sum_B(r_U) / rows.lengths_B.clamp(min=1)

    def departs_from(self, other: "Decision", tolerance: float) -> Tensor:
        """Which utterances, bool [B], have another language, or another reliability, than in `other`.

        Args:
            other: a decision on the same batch.
            tolerance: of the reliability.
        """
        mine, its = self.heard.aux, other.heard.aux
        departs_U = (mine["reliability"] - its["reliability"]).abs() > tolerance
        departs_U |= mine["predicted"] != its["predicted"]
        return self._sum_B(departs_U.float()) > 0 if self.context.by_frame else departs_U

    def _sum_B(self, values_N: Tensor) -> Tensor:
        """Sums of values of frames over utterances."""
        rows = self.context.rows
        return values_N.new_zeros(rows.lengths_B.numel()).index_add(0, rows.utterance_of_row, values_N)


class MixtureFeedForward(nn.Module):
    """LayerNorm, then a mixture of feed-forward experts. For MoLE y = r E_language(x) + (1 - r) E_agnostic(x).

    Args:
        d_model: D.
        moe: the experts, with a router where the layer has one of its own.
    """

    def __init__(self, d_model: int, moe: MoELayer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.moe = moe

    def forward(self, x_BTD: Tensor, frames: PaddedFrames, decision: Decision) -> Tensor:
        """Computes valid frames; padding comes out zero. Adds its plan to those of the decision."""
        x_BTD = self.norm(x_BTD)
        plan = decision.plan
        if plan is None and decision.router is not None:
            plan = decision.router(frames.rows.pack(x_BTD), decision.context)
        y_BTD, plan = self.moe(x_BTD, plan=plan, context=decision.context, rows=frames.rows)
        decision.plans.append(plan)
        return y_BTD


class ExpertMixture(nn.Module):
    """The language tokenizer, the routers that layers share, and a maker of layers of experts.

    Args:
        config: switches.
        languages: codes.
        d_model: D.

    Attributes:
        languages: the codes that the language tokenizer tells apart.
        kept: of these, the places of those that the model still has; None for all (see `asr/prune.py`).
        generations: how many languages and pieces came together, one after the other (see `asr/generations.py`); empty
            where all did.
        familiarity: of each generation, what sounds familiar (see `asr/familiarity.py`); empty where all does.
    """

    def __init__(self, config: MixtureConfig, languages: list[str], d_model: int) -> None:
        super().__init__()
        self.config, self.d_model, self.num_languages = config, d_model, len(languages)
        self.languages = list(languages)
        self.generations: tuple[tuple[int, int], ...] = ()
        self.familiarity = nn.ModuleList()
        names = expert_names(config.expert_of, languages)
        self.expert_names = list(dict.fromkeys(names))  # in the order of their first languages: growing appends
        own, most = len(self.expert_names) == len(languages), len(self.expert_names)
        few = config.mixture == "forced" and not min(2, most) <= config.top_k <= most
        config.refuse([(few, f"top_k: {config.top_k} must be 2..{most}, the experts of these languages")])
        self.families = None if own else [self.expert_names.index(name) for name in names]
        self.language_tokenizer = LanguageTokenizer(d_model, len(languages), config.reliability == "sigmoid")
        self.arrange()
        self.router = self._top_k_router() if config.mixture == "omni" else None
        self.language_embedding = nn.Embedding(len(languages), d_model) if config.language_embedding else None

    def arrange(self, parts: Sequence[int] | None = None, kept: Sequence[int] | None = None) -> None:
        """Says which languages came in which generation, and which are kept; see `LanguageRouter`."""
        self.kept = kept
        self.language_tokenizer.languages.parts = tuple(parts or (self.num_languages,))
        config = self.config
        self.language_router = LanguageRouter(
            self.num_languages, config.reliability, config.temperature, self.families, parts, kept
        )

    def language_posterior(self, logits: Tensor) -> Tensor:
        """Softmax of logits / temperature over the languages that the model has (the last dimension); float32."""
        return (logits.float() / self.config.temperature).softmax(-1)

    def undecided(self, lengths_B: Tensor) -> Tensor | None:
        """The `Decision.newest_B` of heads that are asked before the language is known: the first generation.

        In training, all pieces may be used everywhere.
        """
        return None if self.training or len(self.language_router.parts) == 1 else torch.zeros_like(lengths_B)

    def _top_k_router(self) -> TopKRouter:
        # Raw weights with k = 1: the only way in which the recognition loss reaches the router.
        return TopKRouter(self.d_model, self.config.num_experts, self.config.top_k, self.config.top_k > 1)

    @property
    def experts_per_frame(self) -> int:
        """Experts of a layer that compute a frame, the agnostic one left out."""
        if self.config.mixture == "language":
            return int(self.config.reliability != "zero")
        return self.config.top_k

    def make_layer(self, d_ff: int, activation: Activation = "silu") -> MixtureFeedForward:
        """A layer of experts for this mixture, which must not be "dense".

        Args:
            d_ff: F where the config does not say.
            activation: of the experts.
        """
        config, num_experts = self.config, self.config.num_experts
        router: Router | None = None
        if config.mixture == "language":
            num_experts = self.language_router.num_experts
        elif config.mixture == "switch":
            router = self._top_k_router()
        elif config.mixture == "forced":
            num_experts = len(self.expert_names)
            router = ForcedLabelRouter(self.d_model, num_experts, config.top_k, families=self.families)
        elif config.mixture == "group":
            num_experts *= self.num_languages
            router = LanguageGroupRouter(
                self.d_model, self.num_languages, config.num_experts, config.top_k, config.top_k > 1
            )
        agnostic = config.mixture == "language" and config.reliability != "one"
        width = config.expert_d_ff or d_ff
        return MixtureFeedForward(
            self.d_model, MoELayer(self.d_model, width, num_experts, router, activation, shared_expert=agnostic)
        )

    def forward(
        self, x_BTD: Tensor, frames: PaddedFrames, languages_B: Tensor | None = None, true_probability: float = 1.0
    ) -> tuple[Tensor, Decision]:
        """Hears the language, decides, and adds what the decision says to the stream; see the three methods below.

        Returns:
            The stream and the decision.
        """
        decision = self.decide(self.hear(x_BTD, frames), frames, languages_B, true_probability)
        return self.add_language(x_BTD, decision), decision

    def hear(self, x_BTD: Tensor, frames: PaddedFrames) -> LanguageEvidence:
        """What the language tokenizer hears in the stream behind an early layer."""
        heard_BTD = x_BTD.detach() if self.config.language_probe else x_BTD
        return self.language_tokenizer(heard_BTD, frames.lengths_B, frames.valid_BT)

    def decide(
        self,
        evidence: LanguageEvidence,
        frames: PaddedFrames,
        languages_B: Tensor | None = None,
        true_probability: float = 1.0,
    ) -> Decision:
        """Decides by what was heard.

        Args:
            evidence: of the languages.
            frames: of the batch.
            languages_B: int64 true languages, -1 where unknown. In training the configured routing says what they are
                for; in evaluation they are taken.
            true_probability: with the routing "scheduled", how often the true language is taken in training.
        """
        by_frame, labels_B = self.config.routing_unit == "frame", languages_B
        if self.training and languages_B is not None:
            if self.config.routing == "scheduled":  # drawn once: all layers are told the same
                chance_B = torch.rand(languages_B.shape, device=languages_B.device)
                languages_B = languages_B.where(chance_B < true_probability, -1)
            elif self.config.routing == "predicted":
                languages_B = None
        context = RoutingContext(
            rows=frames.rows,
            language_logits=evidence.evidence_BTN if by_frame else evidence.logits_BN,
            languages_B=languages_B,
            reliability_logits=evidence.reliability_logits_BT if by_frame else evidence.reliability_logits_B,
        )
        heard = self.language_router(None, context)
        plan = heard if self.config.mixture == "language" else None
        newest_B = self.language_router.newest(evidence.logits_BN, replace(context, language_logits=evidence.logits_BN))
        if self.config.mixture == "forced":
            context = replace(context, languages_B=labels_B)
        if self.kept is not None:
            evidence = evidence.select(self.kept)
        families = self.language_router.families
        balances = self.config.mixture in ("switch", "omni", "group")
        return Decision(evidence, heard, context, plan, self.router, families, newest_B, balances)

    def add_language(self, x_BTD: Tensor, decision: Decision) -> Tensor:
        """The stream with the vector of each utterance's, or frame's, language, where the config says so."""
        if self.language_embedding is None:
            return x_BTD
        context = decision.context
        assert context.language_logits is not None
        predicted_U = units_of(context, context.language_logits, "language_logits").argmax(-1)
        vectors_UD = self.language_embedding(routed_language(predicted_U, context))
        return x_BTD + (context.rows.unpack(vectors_UD) if context.by_frame else vectors_UD[:, None])

    def sounds_familiar(self, evidence: LanguageEvidence, frames: PaddedFrames, newest_B: Tensor | None) -> Tensor:
        """Which utterances sound like what the language tokenizer knows, bool [B].

        Args:
            evidence: of the languages.
            frames: of the batch.
            newest_B: `Decision.newest_B`: later generations of languages have no say about an utterance in the language
                of an old one.
        """
        if not self.familiarity:
            return torch.ones_like(frames.lengths_B, dtype=torch.bool)
        hidden_BH = evidence.mean_hidden(frames.valid_BT)
        familiar_BG = torch.stack([familiar(hidden_BH) for familiar in self.familiarity], dim=1)
        if newest_B is None:
            return familiar_BG[:, -1]
        known = familiar_BG.shape[1]  # to generations behind them, all sounds familiar
        return familiar_BG.gather(1, newest_B[:, None].clamp(max=known - 1))[:, 0] | (newest_B >= known)
