"""When each word was said, and how sure the model is of it, from the CTC posteriors.

Shape letters: T frames, V vocabulary.
"""

from itertools import pairwise
from typing import Protocol

import torch
from torchaudio.functional import forced_align, merge_tokens

from mole_asr.decode.greedy import BLANK
from mole_asr.decode.word import Word

WORD_MARK = "▁"
"""Sentencepiece's sign of a space: a piece that starts with it starts a word."""


class Tokenizer(Protocol):
    """What is needed of a text tokenizer (`mole_asr.corpus.text_tokenizer.TextTokenizer`)."""

    def piece(self, token_id: int) -> str:
        """The piece with its word mark."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """The text."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...


def align_words(
    log_probs_TV: torch.Tensor, token_ids: list[int], tokenizer: Tokenizer, frame_shift_s: float
) -> list[Word]:
    """Aligns tokens with frames along the best CTC path and joins them into words.

    CTC fires at one moment of a sound, not throughout: a word lasts from the first frame of its first token to the last
    frame of its last one, which is often a little shorter than the sound.

    Args:
        log_probs_TV: log posteriors of the frames of one utterance, without padding; blank is 0.
        token_ids: what was said, without blanks.
        tokenizer: gives the pieces and texts of the tokens.
        frame_shift_s: seconds a frame.

    Returns:
        The words; times count from the first frame; the confidence is the mean posterior of the word's tokens (a token
        that is nothing but a space counts for neither). Tokens that cannot be aligned (more of them than frames) are
        spread evenly over the time, with confidence 0.
    """
    words = []
    spans = _token_spans(log_probs_TV, token_ids)
    pieces = [tokenizer.piece(token_id) for token_id in token_ids]
    for first, after in _word_ranges(pieces):
        text = tokenizer.decode(token_ids[first:after]).strip()
        if text:
            # A space by itself fires anywhere in the pause before the word.
            heard = [i for i in range(first, after) if pieces[i] != WORD_MARK] or range(first, after)
            starts, ends, posteriors = zip(*(spans[i] for i in heard), strict=True)
            confidence = min(1.0, max(0.0, sum(posteriors) / len(posteriors)))
            words.append(Word(text, starts[0] * frame_shift_s, ends[-1] * frame_shift_s, confidence))
    return words


def _word_ranges(pieces: list[str]) -> list[tuple[int, int]]:
    """(First piece, piece after the last) of each word."""
    starts = [i for i, piece in enumerate(pieces) if i == 0 or piece.startswith(WORD_MARK)]
    return list(zip(starts, [*starts[1:], len(pieces)], strict=False))


def _token_spans(log_probs_TV: torch.Tensor, token_ids: list[int]) -> list[tuple[float, float, float]]:
    """(First frame, frame after the last, mean posterior) of each token."""
    num_frames = len(log_probs_TV)
    repeats = sum(a == b for a, b in pairwise(token_ids))
    if num_frames < len(token_ids) + repeats:
        step = num_frames / len(token_ids)
        return [(i * step, (i + 1) * step, 0.0) for i in range(len(token_ids))]
    if not token_ids:
        return []
    path_1T, scores_1T = forced_align(log_probs_TV.float().cpu()[None], torch.tensor([token_ids]), blank=BLANK)
    return [(span.start, span.end, span.score) for span in merge_tokens(path_1T[0], scores_1T[0].exp(), blank=BLANK)]
