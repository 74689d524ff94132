"""How large a recogniser is, and how much of it one frame uses."""

from dataclasses import dataclass

from torch import nn

from mole_asr.asr.generations import mixture_of
from mole_asr.asr.mixture import MixtureFeedForward
from mole_asr.moe.convert.sliced import sliced_layers
from mole_asr.moe.statistics import expert_cost


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        total: of the whole model, without experts that its config never chooses (the language experts with r = 0).
        active: those that compute one frame: of each layer of experts, and of each sliced part, the chosen ones only.
    """

    total: int
    active: int


def count_parameters(model: nn.Module) -> Parameters:
    """Counts the parameters of a model with an `ExpertMixture`, on whatever encoder it stands."""
    total = active = sum(parameter.numel() for parameter in model.parameters())
    mixture = mixture_of(model)
    chosen = mixture.experts_per_frame
    for layer in model.modules():
        if isinstance(layer, MixtureFeedForward):
            cost = expert_cost(layer.moe.experts, chosen)
            active -= cost.total_parameters - round(cost.active_parameters)
            if not chosen:
                total -= cost.total_parameters - round(cost.active_parameters)
    for sliced in sliced_layers(model).values():
        cost = expert_cost(sliced.experts, sliced.config.active)
        active -= cost.total_parameters - round(cost.active_parameters)
    if mixture.language_embedding is not None:
        active -= mixture.language_embedding.weight.numel() - mixture.d_model
    return Parameters(total, active)
