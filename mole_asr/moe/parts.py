"""Outputs that came later: linear layers and softmax by generations, so that the old ones keep their bits.

A classifier that gets a new class by a wider matrix and a wider softmax changes its old answers, even where the new
class has no probability: products and sums of another width are rounded in another order. Here each generation of
classes is a part with a product of its own, and a softmax is over the classes up to a certain generation: where only
old classes can be meant, it is what it was before the new ones came.

Shape letters: C classes of all parts, c of some.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

ASLEEP = -1e4
"""Logit or log-probability of a class that cannot be meant; finite, as infinite ones make NaN gradients."""


def log_softmax(logits: Tensor, parts: Sequence[int], newest: Tensor | None = None) -> Tensor:
    """Logarithm of the softmax over the last dimension; classes that cannot be meant get `ASLEEP`.

    Args:
        logits: [..., C].
        parts: classes of each generation, the oldest first; they add up to C.
        newest: int64, of the first dimensions of the logits: the newest generation that counts; None for the last.
    """
    if newest is None or len(parts) == 1:
        return logits.log_softmax(-1)
    size = logits.shape[-1]
    some = [(logits[..., :end].log_softmax(-1), size - end) for end in accumulate(parts)]
    return choose([functional.pad(each, (0, later), value=ASLEEP) for each, later in some], newest)


def choose(results: Sequence[Tensor], newest: Tensor | None) -> Tensor:
    """Of the results for each generation those of the newest that counts, [...] of results [...] or [..., C]."""
    if newest is None:
        return results[-1]
    newest = newest.reshape(*newest.shape, *[1] * (results[0].ndim - newest.ndim))
    chosen = results[0]
    for generation, result in enumerate(results[1:], start=1):
        chosen = torch.where(newest >= generation, result, chosen)
    return chosen


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
