"""One batch of utterances, as the model takes it.

Letters: B batch, S samples, U labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Batch:
    """Padded audio and labels of B utterances.

    Attributes:
        audio_BS: float32 waveforms at the model's sampling rate, padded with 0.
        audio_lengths_B: int64, samples.
        labels_BU: int64 token ids, padded with 0 (the blank).
        label_lengths_B: int64.
        languages_B: int64 index into the model's languages; -1 unknown.
        rows_B: int64 rows of the manifest; -1 for the stand-in of a batch whose files were all broken.
        ids: utterance ids.
        texts: reference texts.
        skipped: "id: reason" of each utterance that could not be read.
    """

    audio_BS: Tensor
    audio_lengths_B: Tensor
    labels_BU: Tensor
    label_lengths_B: Tensor
    languages_B: Tensor
    rows_B: Tensor
    ids: list[str]
    texts: list[str]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """A copy with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """A copy with every tensor in pinned memory, for fast transfers to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Example:
    """One utterance before padding: audio_S float32, labels_U integers, and the rest as in `Batch`."""

    audio_S: np.ndarray
    labels_U: np.ndarray
    language: int
    row: int
    id: str
    text: str


def collate(examples: Sequence[Example], skipped: Sequence[str] = ()) -> Batch:
    """Pads examples into a batch, in the given order.

    Args:
        examples: at least one.
        skipped: "id: reason" of the utterances that are missing from the batch.

    Raises:
        ValueError: `examples` is empty.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    return Batch(
        audio_BS=_pad([example.audio_S for example in examples], np.float32),
        audio_lengths_B=torch.tensor([len(example.audio_S) for example in examples]),
        labels_BU=_pad([example.labels_U for example in examples], np.int64),
        label_lengths_B=torch.tensor([len(example.labels_U) for example in examples]),
        languages_B=torch.tensor([example.language for example in examples]),
        rows_B=torch.tensor([example.row for example in examples]),
        ids=[example.id for example in examples],
        texts=[example.text for example in examples],
        skipped=list(skipped),
    )


def _pad(arrays: Sequence[np.ndarray], dtype: type) -> Tensor:
    """Stacks 1-D arrays as rows, filled up with 0."""
    padded: np.ndarray = np.zeros((len(arrays), max(map(len, arrays))), dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)
