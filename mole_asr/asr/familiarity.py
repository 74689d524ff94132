"""How familiar an utterance sounds: whether the language tokenizer has heard its like.

A language tokenizer that was trained on few voices knows them by heart. Of another voice, or in another room, what it
says is worth less, though it sounds as sure. The examples that a model keeps of each language (`asr/replay.py`) tell:
an utterance is unfamiliar where it is less like the nearest of them than nearly all examples are like their nearest
neighbours (Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022). What is compared are
directions from the mean of the examples, which takes several voices.

Letters: B batch, H hidden width, M examples.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.generations import generations_of, mixture_of

# Of the examples themselves, so many are left to be strange.
STRANGE_SHARE = 0.01


class Familiarity(nn.Module):
    """Says which utterances sound like some that are known.

    Args:
        known_MH: their mean hidden vectors, at least one.
    """

    mean_H: Tensor
    known_MH: Tensor
    least: Tensor

    def __init__(self, known_MH: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_H", known_MH.mean(0), persistent=False)
        self.register_buffer("known_MH", functional.normalize(known_MH - self.mean_H), persistent=False)
        neighbours_M = (self.known_MH @ self.known_MH.T).fill_diagonal_(-1.0).amax(1)
        self.register_buffer("least", neighbours_M.quantile(STRANGE_SHARE), persistent=False)

    def forward(self, hidden_BH: Tensor) -> Tensor:
        """Which utterances are familiar, bool [B], by their mean hidden vectors."""
        with torch.autocast(hidden_BH.device.type, enabled=False):  # bfloat16 would round what is compared
            cosine_BM = functional.normalize(hidden_BH - self.mean_H) @ self.known_MH.T
        return cosine_BM.amax(1) >= self.least


def remember(model: nn.Module, examples: Mapping[str, Tensor]) -> None:
    """Lets a model's mixture know what sounds familiar: to each generation of languages what came up to it.

    Args:
        model: a recogniser.
        examples: of each language mean hidden vectors [K, H]; where one lacks them, all sounds familiar to its
            generation and to later ones, or its speakers would all be strangers.
    """
    mixture, end = mixture_of(model), 0
    mixture.familiarity = nn.ModuleList()
    for generation in generations_of(model):
        end += generation.languages
        if any(code not in examples for code in mixture.languages[:end]):
            return
        mixture.familiarity.append(Familiarity(torch.cat([examples[code] for code in mixture.languages[:end]])))
