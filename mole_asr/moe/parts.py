"""Outputs that came later: linear layers and softmax part by part, so that the old part's bits stay what they were.

A classifier that gets a new class by a wider matrix and a wider softmax changes its old answers even where the new
class has no probability: products and sums of another width are rounded in another order. Here each generation of
classes is a part with a product and a softmax of its own, and the parts are merged by their total weights. A part that
sleeps (its logits are `ASLEEP`) has the weight exp(-10000) = 0, and multiplies the others by exactly 1.

Shape letters: C classes of all parts, c of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

ASLEEP = -1e4
"""Bias of a class that nothing is known of yet; finite, as an infinite one would make NaN gradients."""


def softmax(logits: Tensor, parts: Sequence[int]) -> Tensor:
    """Softmax over the last dimension, in the type of the logits.

    Args:
        logits: [..., C].
        parts: classes of each generation, the oldest first; they add up to C.
    """
    if len(parts) == 1:
        return logits.softmax(-1)
    pieces = logits.split(list(parts), -1)
    merged: list[Tensor] = []
    for piece, gap in zip(pieces, _gaps(pieces), strict=True):
        merged = [old * torch.sigmoid(-gap) for old in merged]
        merged.append(piece.softmax(-1) * torch.sigmoid(gap))
    return torch.cat(merged, -1)


def log_softmax(logits: Tensor, parts: Sequence[int]) -> Tensor:
    """Logarithm of `softmax`."""
    if len(parts) == 1:
        return logits.log_softmax(-1)
    pieces = logits.split(list(parts), -1)
    merged: list[Tensor] = []
    for piece, gap in zip(pieces, _gaps(pieces), strict=True):
        merged = [old - functional.softplus(gap) for old in merged]
        merged.append(piece.log_softmax(-1) - functional.softplus(-gap))
    return torch.cat(merged, -1)


def _gaps(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Logarithm [..., 1] of each part's weight over that of all parts before it; infinite for the first."""
    total = pieces[0].new_full((*pieces[0].shape[:-1], 1), -torch.inf)
    gaps = []
    for piece in pieces:
        own = piece.logsumexp(-1, keepdim=True)
        gaps.append(own - total)
        total = torch.logaddexp(total, own)
    return gaps


class PartedLinear(nn.Linear):
    """A linear layer whose outputs came in several generations; a new one has a single part.

    Attributes:
        parts: outputs of each generation, the oldest first. They are not part of the state dict.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.parts: tuple[int, ...] = (out_features,)

    def pieces(self, x: Tensor) -> list[Tensor]:
        """The outputs [..., c] of each part."""
        if len(self.parts) == 1:
            return [super().forward(x)]
        parts = list(self.parts)
        pairs = zip(self.weight.split(parts), self.bias.split(parts), strict=True)
        return [functional.linear(x, weight, bias) for weight, bias in pairs]

    def forward(self, x: Tensor) -> Tensor:
        """The outputs [..., C] of all parts."""
        return join(self.pieces(x))


class PartedInput(nn.Linear):
    """A linear layer whose inputs came in several generations.

    Attributes:
        parts: inputs of each generation, the oldest first. They are not part of the state dict.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.parts: tuple[int, ...] = (in_features,)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what each part of x [..., C] gives; a part of zeros adds exactly nothing."""
        if len(self.parts) == 1:
            return super().forward(x)
        parts = list(self.parts)
        pairs = list(zip(x.split(parts, -1), self.weight.split(parts, 1), strict=True))
        y = functional.linear(pairs[0][0], pairs[0][1].contiguous(), self.bias)
        for piece, weight in pairs[1:]:
            y = y + functional.linear(piece, weight)
        return y


def join(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces behind one another in the last dimension."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), -1)
