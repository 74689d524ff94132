"""A trained dense language model with experts in the place of its feed-forward parts (sparse upcycling)."""

from dataclasses import replace

from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import describe, rebuild
from mole_asr.moe.convert.upcycle import fill_experts
from mole_asr.moe.experts import GATED, Activation
from mole_asr.moe.layer import MoELayer
from mole_asr.text.model import DenseFeedForward, TextModel
from mole_asr.text.policies import ExpertsConfig


def upcycle(
    dense: TextModel, experts: ExpertsConfig, languages: list[str], activation: Activation | None = None
) -> TextModel:
    """A model whose experts are copies of the dense parts, with new routers; all else is as it was.

    Where a token's weights sum to one (`renormalize`; the default of "forced", and of "top_k" from 2 on) it computes
    what the dense one does. With raw weights it starts weaker, as published (Zheng et al., arXiv 2410.10626).

    Args:
        dense: a trained model; its layers that are to get experts must be dense.
        experts: the policy of the new model.
        languages: codes of the new model.
        activation: another one, such as "relu" to make neurons fall silent for MoEfication; training adapts to it.

    Raises:
        MoleError: the experts would be of another width than the dense parts, or the old model has experts.
    """
    if experts.expert_d_ff not in (None, dense.config.d_ff):
        raise MoleError(
            f"model.experts.expert_d_ff: {experts.expert_d_ff} is not the {dense.config.d_ff} of the dense model; "
            "leave it out: copies are as wide"
        )
    config = dense.config if activation is None else replace(dense.config, activation=activation)
    if (config.activation in GATED) != (dense.config.activation in GATED):
        raise MoleError(f"model.new_activation: {activation} does not fit a model with {dense.config.activation}")
    if dense.experts.policy != "dense" and dense.experts != experts.spelled_out(languages):
        raise MoleError("model.init_from: that model has experts already; start from a dense one, or keep its experts")
    sliced = describe(dense)
    if sliced and (experts.policy != "dense" or config != dense.config):
        raise MoleError("model.init_from: that model is sliced; `mole-asr convert dense` makes it dense again")
    model = TextModel(config, experts, languages, dense.vocab_size)
    rebuild(model, sliced, put=lambda part, layer: layer)
    model = model.to(dense.embedding.weight.dtype)
    old = dense.state_dict()
    model.load_state_dict(old, strict=False)
    for new_block, old_block in zip(model.blocks, dense.blocks, strict=True):
        old_part = old_block.feed_forward
        if isinstance(new_block.feed_forward, MoELayer) and isinstance(old_part, DenseFeedForward):
            fill_experts(new_block.feed_forward.experts, old_part.weights())
    return model
