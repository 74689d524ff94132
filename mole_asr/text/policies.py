"""Which layers have experts, how many, and who chooses them: the published systems as values of one config.

| system | config |
|---|---|
| dense | the default |
| Switch, top-1 | policy "top_k", top_k 1 |
| top-2 | policy "top_k", top_k 2 |
| noisy top-k (Shazeer et al., arXiv 1701.06538) | policy "noisy_top_k" |
| adaptive gating (Li et al., arXiv 2310.07188) | policy "adaptive", threshold 0.1 |
| Post-MoE (Zheng et al., arXiv 2410.10626) | policy "forced", layers "last 2", expert_of "language" |
| language-family experts (the same) | policy "forced", layers "last 2", expert_of "branch" |
| expert choice (Zhou et al., arXiv 2202.09368) | policy "expert_choice", in an encoder |
| Omni-router (arXiv 2507.05724) | share_router true |

A model takes a list of them, each for layers of its own. Routers that listen to a language tokenizer have no place
here: a text has none.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from mole_asr.corpus.families import KIN, expert_names
from mole_asr.errors import MoleError
from mole_asr.moe.experts import Activation
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.losses import importance_loss, load_balance_loss, load_loss, router_z_loss
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers import (
    AdaptiveRouter,
    ExpertChoiceRouter,
    ForcedLabelRouter,
    LinearRouter,
    NoisyTopKRouter,
    TopKRouter,
)

Policy = Literal["dense", "top_k", "noisy_top_k", "adaptive", "forced", "expert_choice"]


@dataclass(frozen=True)
class ExpertsConfig:
    """What stands in the place of the dense feed-forward parts.

    Attributes:
        policy: who chooses. "dense": nobody. "top_k": the best scores. "adaptive": the best one where it leads by more
            than `threshold`, else two. "forced": the best scores, in training with the expert of the text's language
            among them; at inference no language is looked at. "noisy_top_k": the best scores, in training with noise of
            a learned strength. "expert_choice": each expert takes its best tokens of the batch, so a decoder would see
            what is to come: for encoders.
        layers: those that have experts: "all", "last 2" (any number), or their places, from 0.
        num_experts: of a layer; with "forced" it follows from `expert_of`.
        top_k: experts a token; for "expert_choice" the mean of them; "adaptive" has its own rule.
        threshold: T of "adaptive".
        renormalize: whether the weights of a token's experts sum to one; null: as the policy is published, except that
            "forced" sums to one, so that a dense model turned into experts starts as itself. "noisy_top_k" always does,
            "expert_choice" never.
        expert_d_ff: width of each expert; null: that of the dense part.
        expert_of: with "forced": "language", "family" or "branch" (close and wide kin, `corpus/families.py`), or a name
            for each language: those of one name share an expert.
        shared_expert: one more expert, as wide, that computes every token with weight one.
        share_router: whether these layers share one router.
    """

    policy: Policy = "dense"
    layers: list[int] | str = "all"
    num_experts: int = 8
    top_k: int = 2
    threshold: float = 0.1
    renormalize: bool | None = None
    expert_d_ff: int | None = None
    expert_of: dict[str, str] | str = "language"
    shared_expert: bool = False
    share_router: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            MoleError: one is wrong; the message names it.
        """
        problems = {
            f"policy: {self.policy!r} is unknown; give one of {', '.join(get_args(Policy))}": (
                self.policy not in get_args(Policy)
            ),
            f"layers: {self.layers!r} is neither all, nor last N, nor a list of places": (
                isinstance(self.layers, str) and not re.fullmatch(r"all|last [1-9]\d*", self.layers)
            ),
            f"num_experts: {self.num_experts} must be positive": self.num_experts < 1,
            f"top_k: {self.top_k} must be 1..{self.num_experts}, the num_experts": (
                self.policy in ("top_k", "noisy_top_k", "expert_choice") and not 1 <= self.top_k <= self.num_experts
            ),
            "top_k: 1 gives noisy_top_k a weight of one and its router no gradient of the text; give 2 or more": (
                self.policy == "noisy_top_k" and self.top_k == 1
            ),
            f"renormalize: {self.policy} has one way; leave it out": (
                self.policy in ("noisy_top_k", "expert_choice") and self.renormalize is not None
            ),
            f"threshold: {self.threshold:g} must be 0..1": not 0 <= self.threshold <= 1,
            f"expert_d_ff: {self.expert_d_ff} must be positive": self.expert_d_ff is not None and self.expert_d_ff < 1,
            f"expert_of: {self.expert_of!r} is none of language, family and branch, and no name for each language": (
                isinstance(self.expert_of, str) and self.expert_of not in ("language", *KIN)
            ),
        }
        for message, is_wrong in problems.items():
            if is_wrong:
                raise MoleError(f"experts.{message}")

    def places(self, num_layers: int) -> list[int]:
        """The layers that have experts, ascending.

        Raises:
            MoleError: there is no such layer.
        """
        if self.policy == "dense":
            return []
        if self.layers == "all":
            return list(range(num_layers))
        if isinstance(self.layers, str):
            last = int(self.layers.removeprefix("last "))
            found = list(range(num_layers - last, num_layers))
        else:
            found = sorted(set(self.layers))
        if not found or found[0] < 0 or found[-1] >= num_layers:
            raise MoleError(f"experts.layers: {self.layers} do not exist; the model has {num_layers} layers")
        return found

    def spelled_out(self, languages: list[str]) -> Self:
        """The same config with the expert of each language named, so that it does not depend on our table."""
        if self.policy != "forced":
            return self
        return replace(self, expert_of=dict(zip(languages, expert_names(self.expert_of, languages), strict=True)))

    def experts_of(self, languages: list[str]) -> list[int]:
        """With "forced", the number of each language's expert: in the order of their first languages."""
        names = expert_names(self.expert_of, languages)
        order = list(dict.fromkeys(names))
        return [order.index(name) for name in names]


def by_layer(experts: Sequence[ExpertsConfig], num_layers: int) -> dict[int, ExpertsConfig]:
    """The config of each layer that has experts, by its place, ascending.

    Raises:
        MoleError: two are for one layer, or a layer does not exist.
    """
    found: dict[int, ExpertsConfig] = {}
    for config in experts:
        for place in config.places(num_layers):
            if place in found:
                raise MoleError(f"experts.layers: layer {place} has experts already; name each once")
            found[place] = config
    return dict(sorted(found.items()))


def make_layer(
    config: ExpertsConfig, d_model: int, d_ff: int, activation: Activation, languages: list[str]
) -> MoELayer:
    """One layer of experts with its router; the policy must not be "dense".

    Args:
        config: the policy.
        d_model: D.
        d_ff: width of the dense part, and of each expert where the config does not say.
        activation: of the experts.
        languages: codes, as labels index them.

    Raises:
        MoleError: too few experts for the policy.
    """
    router = _make_router(config, d_model, languages)
    width, shared = config.expert_d_ff or d_ff, config.shared_expert
    return MoELayer(d_model, width, router.num_experts, router, activation, bias=False, shared_expert=shared)


def _make_router(config: ExpertsConfig, d_model: int, languages: list[str]) -> LinearRouter:
    num_experts, k, shared = config.num_experts, config.top_k, config.shared_expert
    if config.policy == "forced":
        experts = config.experts_of(languages)
        num_experts = max(experts) + 1
        if num_experts < 2:
            raise MoleError(
                f"experts.expert_of: gives {', '.join(languages)} one expert; two are the least for a choice"
            )
        if not 2 <= k <= num_experts:
            raise MoleError(f"experts.top_k: {k} must be 2..{num_experts}, the experts of these languages")
        sums_to_one = config.renormalize is not False
        return ForcedLabelRouter(d_model, num_experts, k, sums_to_one, experts, shared_expert=shared)
    if config.policy == "adaptive":
        return AdaptiveRouter(d_model, num_experts, config.threshold, bool(config.renormalize), shared_expert=shared)
    if config.policy == "noisy_top_k":
        return NoisyTopKRouter(d_model, num_experts, k, shared_expert=shared)
    if config.policy == "expert_choice":
        return ExpertChoiceRouter(d_model, num_experts, k, shared_expert=shared)
    # Raw weights with k = 1: the only way in which the loss of the text reaches the router.
    sums_to_one = k > 1 if config.renormalize is None else config.renormalize
    return TopKRouter(d_model, num_experts, k, sums_to_one, shared_expert=shared)


def routing_losses(policies: Mapping[int, ExpertsConfig], plans: Mapping[int, RoutingPlan]) -> dict[str, Tensor]:
    """Losses of the routers by name, summed over layers: balance and router_z; none where the text alone trains them.

    The balance of "top_k" is Switch's; that of "adaptive" counts tokens of one expert only; that of "noisy_top_k" is
    the squared variation of importance and of load; "forced" and "expert_choice" have no loss but that of the text. So
    they were published, but for one weight of both losses of "noisy_top_k", and router_z, which is ST-MoE's.

    Args:
        policies: the config of each layer that has experts, by its place; slices have none, and no loss.
        plans: what these layers did.
    """
    balance, sizes = [], []
    for layer, plan in plans.items():
        if layer not in policies:  # the slices of a converted layer
            continue
        policy = policies[layer].policy
        if policy in ("forced", "expert_choice"):
            continue
        if policy == "noisy_top_k":
            balance.append(importance_loss(plan) + load_loss(plan))
        else:
            balance.append(load_balance_loss(plan, one_expert_only=policy == "adaptive"))
        sizes.append(router_z_loss(plan))
    return {"balance": torch.stack(balance).sum(), "router_z": torch.stack(sizes).sum()} if balance else {}
