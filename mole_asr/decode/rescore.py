"""Rescoring: the probability of whole texts by a language model, whatever its vocabulary.

Letters: B batch, S tokens with the separator in front, T = S - 1 targets.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mole_asr.decode.beam import Hypothesis, Weights
from mole_asr.text.checkpoint import LanguageModel
from mole_asr.text.figures import UNSPELLED_NATS

_BATCH = 64


def rescore(
    nbest: Sequence[Hypothesis], texts: Sequence[str], language_model: LanguageModel, weights: Weights
) -> list[Hypothesis]:
    """Gives hypotheses the scores of a language model, and orders them anew, the best first.

    Args:
        nbest: what a search has found.
        texts: what each hypothesis says.
        language_model: a decoder.
        weights: of the parts.
    """
    log_probs = text_log_probs(language_model, texts)
    scored = [replace(hypothesis, lm=log_prob) for hypothesis, log_prob in zip(nbest, log_probs, strict=True)]
    return sorted(scored, key=lambda hypothesis: (-hypothesis.total(weights), hypothesis.ids))


@torch.inference_mode()
def text_log_probs(language_model: LanguageModel, texts: Sequence[str]) -> list[float]:
    """Natural logarithm of the probability of each text, its end included, each by itself behind a separator.

    A text longer than the model's window is read in windows that overlap by a half. Letters that its vocabulary cannot
    spell cost as much as in `BitsMeter`: a hypothesis shall gain nothing by them.

    Args:
        language_model: a decoder.
        texts: as the model knows texts; a recogniser's are normalised.
    """
    vocabulary, window = language_model.vocabulary, language_model.window
    separator = [vocabulary.separator]
    rows: list[tuple[int, np.ndarray, int]] = []  # number of the text, tokens, targets that were counted before
    totals = np.zeros(len(texts))
    for number, text in enumerate(texts):
        ids_S = np.concatenate([separator, vocabulary.encode(text), separator])
        if vocabulary.unknown in ids_S:
            totals[number] = -UNSPELLED_NATS * vocabulary.unspelled_bytes(text)
        rows += [(number, part_S, counted) for part_S, counted in _windows(ids_S, window)]
    rows.sort(key=lambda row: len(row[1]))
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        for (number, ids_S, counted), log_probs_T in zip(batch, _score(language_model, batch), strict=True):
            totals[number] += log_probs_T[counted:][ids_S[1 + counted :] != vocabulary.unknown].sum()
    return totals.tolist()


def _windows(ids_S: np.ndarray, window: int) -> list[tuple[np.ndarray, int]]:
    """Parts of at most `window` targets, and how many of these an earlier part has already."""
    if len(ids_S) - 1 <= window:
        return [(ids_S, 0)]
    stride = max(1, window // 2)
    starts = range(0, len(ids_S) - 1 - (window - stride), stride)
    return [(ids_S[start : start + window + 1], window - stride if start else 0) for start in starts]


def _score(language_model: LanguageModel, rows: Sequence[tuple[int, np.ndarray, int]]) -> list[np.ndarray]:
    """Log-probabilities float64[T] of the targets of each row."""
    device = language_model.model.embedding.weight.device
    lengths_B = np.array([len(ids_S) - 1 for _, ids_S, _ in rows])
    tokens_BS = np.full((len(rows), lengths_B.max() + 1), language_model.vocabulary.separator)
    for row, (_, ids_S, _) in enumerate(rows):
        tokens_BS[row, : len(ids_S)] = ids_S
    tokens = torch.from_numpy(tokens_BS).to(device)
    padded = torch.from_numpy(lengths_B).to(device) if (lengths_B < lengths_B.max()).any() else None
    logits_BTV = language_model.model(tokens[:, :-1], padded).logits_BTV
    log_probs_BTV = logits_BTV.double().log_softmax(-1)
    log_probs_BT = log_probs_BTV.gather(-1, tokens[:, 1:, None])[..., 0].cpu().numpy()
    return [log_probs_T[:length] for log_probs_T, length in zip(log_probs_BT, lengths_B, strict=True)]
