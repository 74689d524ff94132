"""Reads, augments and collates the utterances of a batch."""

from array import array
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from mole_asr.audio.augment import AugmentConfig, augment
from mole_asr.audio.read import SAMPLING_RATE_HZ
from mole_asr.corpus.batch import Batch, Example, collate
from mole_asr.corpus.manifest import Manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError

BatchKey = tuple[int, int, np.ndarray]
"""Epoch, number of the batch in it, and rows of the manifest: all that the content of a batch depends on."""


@dataclass(frozen=True)
class LabelTable:
    """Label sequences as two flat arrays: no object an utterance. Indexed by the row of the manifest.

    Attributes:
        values: int32, all labels, one row after the other.
        offsets: int64[N + 1], where each row begins in `values`.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def tokenize(cls, manifest: Manifest, rows: np.ndarray, tokenizer: TextTokenizer) -> "LabelTable":
        """Encodes the texts of some rows, in rising order; the other rows get no label."""
        values, lengths = array("i"), np.zeros(len(manifest), np.int64)
        for row in rows:
            labels = tokenizer.encode(manifest[int(row)].text)
            values.extend(labels)
            lengths[row] = len(labels)
        return cls(np.array(values, np.int32), np.concatenate([[0], np.cumsum(lengths)]))

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64[N] labels of each row."""
        return np.diff(self.offsets)


class SpeechDataset(Dataset[Batch]):
    """Reads, augments and collates whole batches.

    Args:
        manifest: where the utterances stand.
        labels: label sequence of each row of the manifest.
        language_ids: int64[N], index into the model's languages of each row.
        augment_config: waveform augmentation; None for none.
        seed: seed of the augmentation.
    """

    def __init__(
        self,
        manifest: Manifest,
        labels: LabelTable,
        language_ids: np.ndarray,
        augment_config: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.manifest = manifest
        self.labels = labels
        self.language_ids = language_ids
        self.augment_config = augment_config
        self.seed = seed

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of a key; utterances that cannot be read are left out and named in `Batch.skipped`."""
        epoch, number, rows = key
        examples, skipped = [], []
        for place, row in enumerate(rows.tolist()):
            # Seeded by the place in the plan, so that neither workers nor a resume change what is heard.
            rng = np.random.default_rng((self.seed, epoch, number, place))
            utterance = self.manifest[row]
            try:
                audio_S = utterance.read_whole()
            except (MoleError, OSError) as error:
                skipped.append(f"{utterance.id}: {error}")
                continue
            if self.augment_config is not None:
                audio_S = augment(audio_S, self.augment_config, rng, SAMPLING_RATE_HZ)
            language = int(self.language_ids[row])
            examples.append(Example(audio_S, self.labels[row], language, row, utterance.id, utterance.text))
        return collate(examples or [_silence()], skipped)


def _silence() -> Example:
    """Stands in for a batch with no readable file: every rank must have a batch, or the others wait for it for ever."""
    return Example(np.zeros(SAMPLING_RATE_HZ, np.float32), np.zeros(0, np.int64), -1, -1, "", "")
