"""Texts packed into windows of one length, each of one language, and batches of them.

The sentences of a language stand one after the other as the file has them, a separator before the first and behind
each. Windows overlap by one token, the last target of one being the first input of the next, so that every token but
the first separator is predicted exactly once.

Letters: P tokens of the whole stream, W windows, B batch, T targets of a window, S = T + 1 its tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mole_asr.text.vocabulary import Vocabulary

IGNORED = -1  # a target that is not to be predicted, such as padding
UNSPELLED = -2  # letters that the vocabulary cannot spell, which cannot be predicted


@dataclass
class TextBatch:
    """B windows.

    Attributes:
        tokens_BS: int64; inputs are the first T, targets the last T; padded at the end with separators.
        byte_shares_BS: float32 bytes that each token stands for, zero at padding: a sentence's UTF-8 bytes and one for
            its separator, spread evenly over its tokens; letters that cannot be spelled have their own.
        lengths_B: int64, targets that are no padding.
        languages_B: int64, -1 for a language that the model has not.
        rows_B: int64, numbers of the windows.
        padded: whether any window is shorter than T.
        unknown: id of letters that cannot be spelled, if there is one.
    """

    tokens_BS: Tensor
    byte_shares_BS: Tensor
    lengths_B: Tensor
    languages_B: Tensor
    rows_B: Tensor
    padded: bool
    unknown: int | None = None

    def __len__(self) -> int:
        return len(self.lengths_B)

    def targets(self) -> Tensor:
        """int64 [B, T], the next token of each; `IGNORED` at padding, `UNSPELLED` for what cannot be spelled."""
        targets_BT = self.tokens_BS[:, 1:]
        if self.unknown is not None:
            targets_BT = targets_BT.masked_fill(targets_BT == self.unknown, UNSPELLED)
        if not self.padded:
            return targets_BT
        places_T = torch.arange(targets_BT.shape[1], device=targets_BT.device)
        return targets_BT.where(places_T < self.lengths_B[:, None], IGNORED)

    def hide(self, share: float, mask: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """What an encoder reads, and what it is to say (masked language modelling, Devlin et al., 2019).

        Args:
            share: of the tokens that are hidden.
            mask: id that stands for a hidden one.
            generator: draws them, on the CPU; None for torch's own.

        Returns:
            int64 [B, T] each: the targets, those that are hidden masked; and the hidden ones, else `IGNORED`.
        """
        targets_BT = self.targets()
        hidden_BT = torch.rand(targets_BT.shape, generator=generator).to(targets_BT.device) < share
        return self.tokens_BS[:, 1:].masked_fill(hidden_BT, mask), targets_BT.where(hidden_BT, IGNORED)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TextBatch":
        """A copy with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TextBatch":
        moved: dict[str, Any] = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of some texts.

    Attributes:
        tokens_P: ids, one language behind the other.
        byte_shares_P: float32, as in `TextBatch`.
        starts_W: int64, first token of each window.
        lengths_W: int64, its targets.
        languages_W: int64.
        separator: id for padding.
        unknown: as in `TextBatch`.
    """

    tokens_P: np.ndarray
    byte_shares_P: np.ndarray
    starts_W: np.ndarray
    lengths_W: np.ndarray
    languages_W: np.ndarray
    separator: int
    unknown: int | None = None

    def __len__(self) -> int:
        return len(self.starts_W)

    def batch(self, rows: np.ndarray) -> TextBatch:
        """The windows of these numbers, in this order."""
        lengths_B = self.lengths_W[rows]
        longest = int(lengths_B.max())
        offsets_S = np.arange(longest + 1)
        valid_BS = offsets_S <= lengths_B[:, None]
        places_BS = np.where(valid_BS, self.starts_W[rows][:, None] + offsets_S, 0)
        return TextBatch(
            tokens_BS=torch.from_numpy(np.where(valid_BS, self.tokens_P[places_BS], self.separator).astype(np.int64)),
            byte_shares_BS=torch.from_numpy(np.where(valid_BS, self.byte_shares_P[places_BS], 0).astype(np.float32)),
            lengths_B=torch.from_numpy(lengths_B),
            languages_B=torch.from_numpy(self.languages_W[rows]),
            rows_B=torch.from_numpy(np.asarray(rows, np.int64)),
            padded=bool((lengths_B < longest).any()),
            unknown=self.unknown,
        )

    def thinned(self, per_language: int | None, seed: int) -> "Windows":
        """At most so many windows a language, chosen at random, in the order in which they stand; all for None."""
        if per_language is None:
            return self
        rng = np.random.default_rng(seed)
        rows = [np.flatnonzero(self.languages_W == language) for language in np.unique(self.languages_W)]
        chosen = np.concatenate([np.sort(rng.permutation(each)[:per_language]) for each in rows])
        return replace(
            self,
            starts_W=self.starts_W[chosen],
            lengths_W=self.lengths_W[chosen],
            languages_W=self.languages_W[chosen],
        )


def pack_windows(
    texts: Mapping[str, Sequence[str]], languages: Sequence[str], vocabulary: Vocabulary, window: int, fill: bool
) -> Windows:
    """Packs texts by language; languages without a number come out as -1.

    Args:
        texts: of each language, at least one.
        languages: codes by their numbers.
        vocabulary: makes ids of texts.
        window: T.
        fill: whether the last window of a language is filled up from the beginning of its texts, as in training; else
            it is shorter.
    """
    kind = np.uint16 if vocabulary.size <= 1 << 16 else np.int32
    tokens, shares, starts, lengths, numbers = [], [], [], [], []
    first = 0
    for language, sentences in texts.items():
        tokens_P, shares_P = _stream(sentences, vocabulary)
        targets = len(tokens_P) - 1
        count = -(-targets // window)
        if fill:
            places_P = np.concatenate([[0], 1 + np.arange(count * window) % targets])
            tokens_P, shares_P, targets = tokens_P[places_P], shares_P[places_P], count * window
        begin_W = window * np.arange(count)
        tokens.append(tokens_P.astype(kind))
        shares.append(shares_P)
        starts.append(first + begin_W)
        lengths.append(np.minimum(window, targets - begin_W))
        numbers.append(np.full(count, languages.index(language) if language in languages else -1))
        first += len(tokens_P)
    join = np.concatenate
    columns = join(tokens), join(shares), join(starts), join(lengths), join(numbers)
    return Windows(*columns, vocabulary.separator, vocabulary.unknown)


def _stream(sentences: Sequence[str], vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all sentences of a language with their separators, and the bytes that each stands for."""
    separator = np.array([vocabulary.separator])
    tokens, shares = [separator], [np.zeros(1, np.float32)]
    for sentence in sentences:
        ids = np.append(vocabulary.encode(sentence), separator)
        tokens.append(ids)
        size, spelled = len(sentence.encode("utf-8")) + 1, ids != vocabulary.unknown
        runs = [] if spelled.all() else [len(run.encode("utf-8")) for run in vocabulary.unspelled(sentence)]
        shares.append(np.full(len(ids), (size - sum(runs)) / spelled.sum(), np.float32))
        shares[-1][~spelled] = runs
    return np.concatenate(tokens), np.concatenate(shares)
