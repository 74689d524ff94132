"""What is counted over a set of texts: bits a byte of each language, and what the routers of each layer did.

Letters: B windows, T tokens, N tokens of the batch that are no padding, L languages, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.moe.losses import expert_counts
from mole_asr.moe.statistics import loads_by_language, purity
from mole_asr.text.model import TextOutput
from mole_asr.text.windows import IGNORED, UNSPELLED

UNSPELLED_NATS = math.log(256)  # a byte that cannot be spelled costs what a guess among all bytes does


def nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target, float32 [B, T]; zero where there is none to predict."""
    targets_N = targets_BT.flatten().clamp(min=IGNORED)
    flat = functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_N, ignore_index=IGNORED, reduction="none")
    return flat.view_as(targets_BT)


def costs(nats_BT: Tensor, byte_shares_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Nats and bytes of each window, float64 [B, 2].

    Args:
        nats_BT: as `nats` gives them; letters that the vocabulary cannot spell cost 8 bits a byte.
        byte_shares_BT: bytes that each target stands for.
        targets_BT: those that are `IGNORED` are in neither sum.
    """
    unspelled_BT = UNSPELLED_NATS * byte_shares_BT.where(targets_BT == UNSPELLED, 0)
    bytes_BT = byte_shares_BT.where(targets_BT != IGNORED, 0)
    return torch.stack([(nats_BT + unspelled_BT).double().sum(1), bytes_BT.double().sum(1)], dim=1)


class BitsMeter:
    """Sums what texts cost, by language.

    Bits a byte = sum of -log2 p(token) / bytes of the texts, UTF-8, a separator counting as one byte: it does not
    depend on how a vocabulary cuts the texts. Letters that it cannot spell cost 8 bits a byte.

    Args:
        num_languages: L.

    Attributes:
        sums_L2: float64, nats and bytes.
    """

    def __init__(self, num_languages: int) -> None:
        self.sums_L2 = torch.zeros(num_languages, 2, dtype=torch.float64)

    def add(self, nats_BT: Tensor, byte_shares_BT: Tensor, targets_BT: Tensor, languages_B: Tensor) -> None:
        """Adds a batch; windows of an unknown language are left out.

        Args:
            nats_BT: as of `costs`.
            byte_shares_BT: as of `costs`.
            targets_BT: as of `costs`.
            languages_B: of each window.
        """
        known_B, sums_B2 = languages_B >= 0, costs(nats_BT, byte_shares_BT, targets_BT)
        self.sums_L2.index_add_(0, languages_B[known_B].cpu(), sums_B2[known_B].detach().cpu())

    def bits_per_byte(self, sums_L2: Tensor | None = None) -> Tensor:
        """float64 [L]; NaN for a language without texts.

        Args:
            sums_L2: those of all processes; None for this one's.
        """
        sums_L2 = self.sums_L2 if sums_L2 is None else sums_L2
        return sums_L2[:, 0] / sums_L2[:, 1] / math.log(2)


@dataclass(frozen=True)
class LayerFigures:
    """What the router of one layer did.

    Attributes:
        several_share: share of the tokens that two or more experts computed.
        experts_per_token: mean number of experts a token.
        load_entropy: of the share of the load that each expert had, over log E: 1 when even.
        language_entropy: the same of each language alone, then the mean over languages: it falls below the load's
            entropy where languages go different ways ("spread out in the end", Post-MoE).
        purity: share of the load that went to an expert from its most frequent language.
    """

    several_share: float
    experts_per_token: float
    load_entropy: float
    language_entropy: float
    purity: float


class RoutingMeter:
    """Sums what routers did.

    Args:
        num_experts: of each layer that has experts, by its place.
        num_languages: L.

    Attributes:
        sums: by layer, float64 [L, E + 2]: how often a token of each language had each expert; its tokens; those of
            them with two or more experts.
    """

    def __init__(self, num_experts: dict[int, int], num_languages: int) -> None:
        self.sums = {
            layer: torch.zeros(num_languages, count + 2, dtype=torch.float64) for layer, count in num_experts.items()
        }

    @torch.no_grad()
    def add(self, output: TextOutput, languages_B: Tensor) -> None:
        """Adds a batch; windows of an unknown language are left out."""
        languages_N = languages_B[output.rows.utterance_of_row]
        known_N = languages_N >= 0
        for layer, plan in output.plans.items():
            sums = self.sums[layer]
            plan = plan.to_token_layout(output.rows.num_rows)
            several_N = (plan.expert_ids < plan.num_experts).sum(-1) > 1
            added = [
                loads_by_language(plan, languages_N, len(sums)),
                expert_counts(languages_N[known_N], len(sums))[:, None],
                expert_counts(languages_N[known_N & several_N], len(sums))[:, None],
            ]
            sums += torch.cat(added, dim=1).double().cpu()

    def figures(self, sums: dict[int, Tensor] | None = None) -> dict[int, LayerFigures]:
        """Figures of each layer that computed anything.

        Args:
            sums: those of all processes; None for this one's.
        """
        sums = self.sums if sums is None else sums
        return {layer: _figures(each) for layer, each in sums.items() if each.sum() > 0}


def _figures(sums: Tensor) -> LayerFigures:
    loads_LE, tokens, several = sums[:, :-2], sums[:, -2].sum(), sums[:, -1].sum()
    heard = loads_LE[loads_LE.sum(1) > 0]
    return LayerFigures(
        several_share=float(several / tokens),
        experts_per_token=float(loads_LE.sum() / tokens),
        load_entropy=float(_entropy(loads_LE.sum(0, keepdim=True)).mean()),
        language_entropy=float(_entropy(heard).mean()),
        purity=float(purity(loads_LE)),
    )


def _entropy(loads_LE: Tensor) -> Tensor:
    """Entropy of each row's shares over log E."""
    shares_LE = loads_LE / loads_LE.sum(1, keepdim=True)
    return torch.special.entr(shares_LE).sum(1) / math.log(max(loads_LE.shape[1], 2))


def major_and_minor(values: dict[str, float], major: Sequence[str]) -> dict[str, float]:
    """Means over the languages: of all, of the major and of the minor ones, where there are any.

    Args:
        values: of each language.
        major: codes of the major ones.
    """
    groups = {
        "all": list(values.values()),
        "major": [value for code, value in values.items() if code in major],
        "minor": [value for code, value in values.items() if code not in major],
    }
    return {name: sum(group) / len(group) for name, group in groups.items() if group}
