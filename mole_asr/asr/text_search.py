"""The texts that the attention head is writing of one utterance: a beam search, token by token.

Letters: K drafts, C candidates for the next token of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

# Drafts of an utterance that go on together; recipes/whisper_mole says what they bring and what they cost.
BEAM = 5
# Nobody says the same three times over, so many tokens in all; a decoder that has lost its place goes on for ever.
LOOP_COPIES, LOOP_TOKENS = 3, 8


Prior: TypeAlias = Callable[[list[int], bool], float]
"""What the words of a text say for it, from its tokens, and whether these are all."""


class Written(NamedTuple):
    """A text.

    Attributes:
        text: what was written.
        log_prob: mean logarithm of the probability of its tokens, the end sign's too.
        score: the same, with what its words say for it.
    """

    text: str
    log_prob: float
    score: float


def cut_loop(ids: list[int]) -> bool:
    """Whether a text ends in a loop: the same tokens at least three times, eight tokens in all; leaves one copy.

    Args:
        ids: tokens; those of the other copies are removed.
    """
    for period in range(1, len(ids) // LOOP_COPIES + 1):
        copies = max(LOOP_COPIES, -(-LOOP_TOKENS // period))
        fits = ids[-1] == ids[-1 - period] and copies * period <= len(ids)  # cheap: nearly all end here
        if fits and ids[-period:] * copies == ids[-copies * period :]:
            del ids[-(copies - 1) * period :]
            return True
    return False


@dataclass(slots=True)
class Draft:
    """A text so far.

    Attributes:
        ids: its tokens.
        log_probs: of each.
        end_log_probs: of the end sign in place of each, and behind the last.
    """

    ids: list[int]
    log_probs: list[float]
    end_log_probs: list[float]

    def longer(self, token: int, log_prob: float) -> "Draft":
        """With one more token."""
        return Draft([*self.ids, token], [*self.log_probs, log_prob], self.end_log_probs.copy())

    @property
    def mean_log_prob(self) -> float:
        """Over the tokens and the end sign behind them; of a text that a loop was cut from, over what is left."""
        count = len(self.ids)
        return (sum(self.log_probs[:count]) + self.end_log_probs[count]) / (count + 1)


class TextSearch:
    """The drafts of one utterance.

    A draft ends with the end sign, or where it repeats itself (`cut_loop`); all do at the limit. The search is over
    when as many have ended as may go on (Sutskever et al., 2014, section 3.2), or fewer than that are left; the best
    has the highest mean log-probability, which favours neither short nor long texts.

    Args:
        beam: drafts that go on together; with 1 it is greedy (with a prior, among the two likeliest tokens).
        limit: of the tokens of a text.
        end_id: the end sign.
        prior: is added to the logarithm of the probability of a text (shallow fusion); None: nothing is known of words.

    Attributes:
        drafts: those that go on, the likeliest first.
    """

    def __init__(self, beam: int, limit: int, end_id: int, prior: Prior | None = None) -> None:
        self.beam, self.limit, self.end_id, self.prior = beam, limit, end_id, prior
        self.drafts = [Draft([], [], [])]
        self._ended: list[Draft] = []

    def step(
        self,
        tokens_KC: Sequence[Sequence[int]],
        log_probs_KC: Sequence[Sequence[float]],
        end_log_probs_K: Sequence[float],
    ) -> list[int]:
        """Chooses the next tokens.

        Args:
            tokens_KC: the likeliest tokens behind each draft; with twice as many as the beam, none is missed (but one
                that a prior would have put before them).
            log_probs_KC: of these.
            end_log_probs_K: of the end sign.

        Returns:
            For each of the new `drafts` the place of the one it continues; empty when the search is over.
        """
        for draft, end_log_prob in zip(self.drafts, end_log_probs_K, strict=True):
            draft.end_log_probs.append(end_log_prob)
        if len(self.drafts[0].ids) == self.limit:
            self._ended += self.drafts
            return []
        totals_K = [sum(draft.log_probs) for draft in self.drafts]
        candidates = [
            (totals_K[place] + log_prob + self._said(self.drafts[place], token), place, token, log_prob)
            for place, row in enumerate(zip(tokens_KC, log_probs_KC, strict=True))
            for token, log_prob in zip(*row, strict=True)
        ]
        going: list[Draft] = []
        parents: list[int] = []
        for _, place, token, log_prob in sorted(candidates, key=lambda each: -each[0]):
            draft = self.drafts[place]
            if token == self.end_id:
                self._ended.append(draft)
            elif cut_loop((longer := draft.longer(token, log_prob)).ids):
                self._ended.append(longer)
            else:
                going.append(longer)
                parents.append(place)
            if len(going) == self.beam or len(self._ended) == self.beam:
                break
        if len(self._ended) == self.beam or len(going) < self.beam:
            return []
        self.drafts = going
        return parents

    def _said(self, draft: Draft, token: int) -> float:
        """What the words of a draft with one more token say for it."""
        if self.prior is None:
            return 0.0
        whole = token == self.end_id
        return self.prior(draft.ids if whole else [*draft.ids, token], whole)

    @property
    def best(self) -> tuple[Draft, float]:
        """Of those that have ended; and its mean log-probability with what its words say for it."""
        scores = [draft.mean_log_prob + self._said(draft, self.end_id) / (len(draft.ids) + 1) for draft in self._ended]
        place = max(range(len(scores)), key=scores.__getitem__)
        return self._ended[place], scores[place]
