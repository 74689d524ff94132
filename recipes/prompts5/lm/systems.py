"""The ways of decoding that are compared, and how their weights are chosen on the dev split."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from mole_asr.decode.beam import Hypothesis, Weights
from mole_asr.decode.decoder import WEIGHTS, CtcDecoder, LmMode


@dataclass(frozen=True)
class System:
    """A way of decoding.

    Attributes:
        title: for tables.
        mode: of the language model; None without one.
        start: where the choice of weights begins.
        after: a system whose weights are chosen before; this one begins with those of them that `start` lacks.
        beam: prefixes of the search; 0 for greedy, None for the default.
    """

    title: str
    mode: LmMode | None = None
    start: dict[str, float] = field(default_factory=dict)
    after: str | None = None
    beam: int | None = None


_NOTHING = {"ngram": 0.0, "lm": 0.0, "bonus": 0.0}
SYSTEMS = {
    "greedy": System("greedy", start=_NOTHING, beam=0),
    "beam": System("beam search", start=_NOTHING),
    "ngram": System("n-grams (the default)", start=asdict(WEIGHTS[None])),
    "rescore": System("n-grams, rescored", "rescore", {"lm": 0.4, "bonus": 1.3}, "ngram"),
    "fusion": System("n-grams and fusion", "fusion", {}, "rescore"),
}
STEPS = {"lm": 0.2, "bonus": 0.4}  # of what is chosen for a language model; the n-grams keep their weight
Rates = tuple[float, float]


def choose(start: Weights, rates: Callable[[Weights], Rates]) -> tuple[Weights, Rates]:
    """Moves one weight after the other by a step while that lowers the error rates, until no step does.

    Args:
        start: weights to begin with; those that are moved stay above 0.
        rates: macro word and character error rate on the dev split; the latter decides between equal former ones.
    """
    best, lowest = start, rates(start)
    tried = {start}
    improved = True
    while improved:
        improved = False
        for name, size in STEPS.items():
            for step in (size, -size):
                while True:
                    weights = replace(best, **{name: round(getattr(best, name) + step, 3)})
                    if getattr(weights, name) <= 0 or weights in tried:
                        break
                    tried.add(weights)
                    found = rates(weights)
                    if found >= lowest:
                        break
                    best, lowest, improved = weights, found, True
    return best, lowest


class Lists:
    """The n-best lists of the dev split for any weights; what the weights do not change is not computed again."""

    def __init__(self, decoder: CtcDecoder, log_probs: list[np.ndarray], languages: list[str]) -> None:
        self.decoder, self.log_probs, self.languages = decoder, log_probs, languages
        self._first_pass: dict[float, list[list[Hypothesis]]] = {}

    def best(self, weights: Weights) -> list[tuple[int, ...]]:
        """Token ids of each utterance."""
        self.decoder.weights = weights
        if not self.decoder.beam:
            return [tuple(ids) for ids in self.decoder.decode(self.log_probs, self.languages)]
        if self.decoder.rescorer is None:
            return [nbest[0].ids for nbest in self.decoder.nbest(self.log_probs, self.languages)]
        if weights.ngram not in self._first_pass:
            self._first_pass[weights.ngram] = self.decoder.nbest(self.log_probs, self.languages)
        return [
            min(nbest, key=lambda each: (-each.total(weights), each.ids)).ids
            for nbest in self._first_pass[weights.ngram]
        ]
