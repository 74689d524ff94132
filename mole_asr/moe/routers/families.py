"""Languages that share an expert.

Shape letters: U units (utterances or frames), L languages, E families, each with one expert.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn


class Families(nn.Module):
    """A map from language to family; the families are numbered as their experts.

    Post-MoE (Zheng et al., arXiv 2410.10626) serves 50 languages with 7 family experts, so that a new language adds no
    parameters.

    Args:
        family_of_language: for each language the number of its family; all of 0..highest must occur.

    Raises:
        ValueError: a number is negative, or a family has no language.
    """

    family_of_language_L: Tensor
    member_LE: Tensor

    def __init__(self, family_of_language: Sequence[int]) -> None:
        super().__init__()
        found = sorted(set(family_of_language))
        if not found or found != list(range(len(found))):
            raise ValueError(f"families must be numbered 0, 1, ... without a gap, not {found}")
        self.num_families = len(found)
        self._families_of_first = [top + 1 for top in accumulate(family_of_language, max)]
        families_L = torch.tensor(list(family_of_language))
        member_LE = families_L[:, None] == torch.arange(self.num_families)
        self.register_buffer("family_of_language_L", families_L, persistent=False)
        self.register_buffer("member_LE", member_LE, persistent=False)

    def of(self, languages: Tensor) -> Tensor:
        """The family of each language (int64); -1 stays -1."""
        families = self.family_of_language_L[languages.long().clamp(min=0)]
        return families.where(languages >= 0, -1)

    def logits(self, logits_UL: Tensor) -> Tensor:
        """Logits [U, E] whose softmax gives each family the sum of its languages' probabilities.

        Of the first languages alone, it gives those of their families, which must be the first ones.
        """
        member_LE = self.member_LE[: logits_UL.shape[1]]
        if logits_UL.shape[1] < len(self.member_LE):
            member_LE = member_LE[:, : self._families_of_first[len(member_LE) - 1]]
        return logits_UL[:, :, None].where(member_LE, -torch.inf).logsumexp(1)
