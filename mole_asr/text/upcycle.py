"""A trained dense language model with experts in the place of its feed-forward parts (sparse upcycling)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import describe, rebuild
from mole_asr.moe.convert.upcycle import fill_experts
from mole_asr.moe.experts import GATED, Activation
from mole_asr.moe.layer import MoELayer
from mole_asr.text.model import DenseFeedForward, TextModel
from mole_asr.text.policies import ExpertsConfig

# Two ways to read the same scores: a model trained with one can go on with the other.
_SAME_ROUTER = ("top_k", "adaptive")


def upcycle(
    dense: TextModel, experts: Sequence[ExpertsConfig], languages: list[str], activation: Activation | None = None
) -> TextModel:
    """A model whose experts are copies of the dense parts, with new routers; all else is as it was.

    Where a token's weights sum to one (`renormalize`; "noisy_top_k", the default of "forced", and of "top_k" from 2 on)
    it computes what the dense one does. With raw weights it starts weaker, as published (Zheng et al., arXiv
    2410.10626), and with "expert_choice" too, where tokens may have no expert.

    Args:
        dense: a trained model; layers that have experts keep them, and may change how many of them a token takes
            ("top_k" and "adaptive", with all that these say).
        experts: the policies of the new model.
        languages: codes of the new model.
        activation: another one, such as "relu" to make neurons fall silent for MoEfication; training adapts to it.

    Raises:
        MoleError: copies of the dense parts would not compute what these do, or the old model has other experts.
    """
    config = dense.config if activation is None else replace(dense.config, activation=activation)
    if (config.activation in GATED) != (dense.config.activation in GATED):
        raise MoleError(f"model.new_activation: {activation} does not fit a model with {dense.config.activation}")
    model = TextModel(config, experts, languages, dense.vocab_size)
    _check(dense, model)
    sliced = describe(dense)
    if sliced and (model.policies or config != dense.config):
        raise MoleError("model.init_from: that model is sliced; `mole-asr convert dense` makes it dense again")
    rebuild(model, sliced, put=lambda part, layer: layer)
    model = model.to(dense.embedding.weight.dtype)
    old = dense.state_dict()
    model.load_state_dict(old, strict=False)
    for new_block, old_block in zip(model.blocks, dense.blocks, strict=True):
        old_part = old_block.feed_forward
        if isinstance(new_block.feed_forward, MoELayer) and isinstance(old_part, DenseFeedForward):
            fill_experts(new_block.feed_forward.experts, old_part.weights())
    return model


def _check(dense: TextModel, model: TextModel) -> None:
    """Refuses experts that are no copies of the dense parts, and others than the old model has."""
    for layer, policy in model.policies.items():
        if layer in dense.policies:
            continue
        if policy.expert_d_ff not in (None, dense.config.d_ff):
            raise MoleError(
                f"experts.expert_d_ff: {policy.expert_d_ff} is not the {dense.config.d_ff} of the dense model; leave "
                f"it out for layer {layer}: copies are as wide"
            )
        if policy.shared_expert:
            raise MoleError(
                f"experts.shared_expert: beside copies of a dense part it would double the output; leave it out for "
                f"layer {layer}"
            )
    for layer, policy in dense.policies.items():
        if layer not in model.policies or not _has_same_experts(model.policies[layer], policy):
            raise MoleError(
                f"model.init_from: layer {layer} of that model has experts already; start from a dense one, "
                "or keep its experts"
            )
    for a, b in combinations(dense.policies, 2):
        if _share_a_router(model, a, b) and not _share_a_router(dense, a, b):
            raise MoleError(
                f"experts.share_router: layers {a} and {b} of that model have a router each; keep them apart"
            )


def _has_same_experts(new: ExpertsConfig, old: ExpertsConfig) -> bool:
    changed: dict[str, Any] = {"layers": old.layers}
    if {new.policy, old.policy} <= set(_SAME_ROUTER):
        changed |= {name: getattr(old, name) for name in ("policy", "top_k", "threshold", "renormalize")}
    return replace(new, **changed) == old


def _share_a_router(model: TextModel, a: int, b: int) -> bool:
    parts = [model.blocks[layer].feed_forward for layer in (a, b)]
    return len({id(part.router) for part in parts if isinstance(part, MoELayer)}) == 1
