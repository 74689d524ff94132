"""How strongly a step pulls at each expert: who learns, and who is starved.

Letters: E experts.
"""

import torch
from torch import Tensor, nn

from mole_asr.asr.generations import mixture_of
from mole_asr.asr.mixture import MixtureFeedForward


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of the gradient of each expert's parameters, over all layers.

    In y = r E_language(x) + (1 - r) E_agnostic(x), the experts' gradients carry the factors r and 1 - r: an r that
    saturates early starves the agnostic expert.

    Args:
        model: a recogniser whose gradients stand.

    Returns:
        Name -> norm, a scalar: of language experts the names of their languages or families, of others their numbers;
        "agnostic" for the agnostic expert. Empty without experts, or without any gradient.
    """
    squares: dict[str, Tensor] = {}
    mixture = mixture_of(model)
    for layer in model.modules():
        if isinstance(layer, MixtureFeedForward):
            experts = layer.moe.experts
            named = (
                mixture.config.mixture in ("language", "forced") and len(mixture.expert_names) == experts.num_experts
            )
            names = mixture.expert_names if named else [str(number) for number in range(experts.num_experts)]
            for parameter_name, parameter in experts.named_parameters():
                if parameter.grad is None:
                    continue
                is_shared = parameter_name.startswith("shared_")
                squares_E = parameter.grad.detach().float().square().reshape(1 if is_shared else len(names), -1).sum(1)
                for name, square in zip(["agnostic"] if is_shared else names, squares_E, strict=True):
                    squares[name] = squares.get(name, torch.zeros_like(square)) + square
    return {name: square.sqrt() for name, square in squares.items()}
