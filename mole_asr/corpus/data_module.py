"""From manifests to batches: what is read, what is left out, and where a resumed run goes on.

The order is `BatchPlan` (which rows) -> `SpeechDataset` (reads and augments them) -> `Batch`.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import distributed
from torch.utils.data import DataLoader

from mole_asr.arguments import check_once, check_seed
from mole_asr.audio.augment import AugmentConfig
from mole_asr.audio.features import FRAME_SHIFT_S, SUBSAMPLING
from mole_asr.corpus.batch import Batch
from mole_asr.corpus.batch_plan import BatchPlan, Selection, required_frames
from mole_asr.corpus.dataset import BatchKey, LabelTable, SpeechDataset
from mole_asr.corpus.loader import PlacedLoader, place_of
from mole_asr.corpus.manifest import Manifest
from mole_asr.corpus.text_tokenizer import TextTokenizer
from mole_asr.errors import MoleError

log = logging.getLogger(__name__)


class PlanLoader(PlacedLoader):
    """Iterates over the batches of a plan.

    Args:
        dataset: makes a batch from a key.
        plan: the batches of an epoch, as positions in `rows`.
        rows: int64[N] rows of the manifest that are used.
        rank: this process among `plan.world_size`.
        num_workers: reading processes; 0 reads in the training process.
        place: returns (epoch, next batch).
        skipped: gets "id: reason" of each utterance that cannot be read.
    """

    def __init__(
        self,
        dataset: SpeechDataset,
        plan: BatchPlan,
        rows: np.ndarray,
        rank: int,
        num_workers: int,
        place: Callable[[], tuple[int, int]],
        skipped: set[str],
    ) -> None:
        super().__init__(plan.num_batches, place, "utterances")
        self.dataset = dataset
        self.plan = plan
        self.rows = rows
        self.rank = rank
        self.skipped = skipped
        self._keys: list[BatchKey] = []
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._keys,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: a loader that draws from the global one would change the dropout of a resumed run.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.place()
        batches = self.plan.batches(epoch, self.rank)
        # Numbered over all ranks: no two draw the same augmentation.
        keys = enumerate(batches)
        numbered = [(epoch, n * self.plan.world_size + self.rank, self.rows[places]) for n, places in keys]
        self._keys[:] = numbered[first:]
        for batch in self._loader:
            for reason in set(batch.skipped) - self.skipped:
                log.warning("skipped %s", reason)
            self.skipped.update(batch.skipped)
            yield batch


class SpeechDataModule(LightningDataModule):
    """Training and validation batches from two manifests.

    After `setup`, `selections["train"]` and `selections["valid"]` say what is used and what was left out, `skipped`
    what could not be read so far, "id: reason" each. `frame_shift_s`, seconds a frame of the model that is trained,
    says which utterances have a frame for every label; where it is not that of our own models, set it before `setup`.

    Args:
        train_manifest: cut set (JSONL) to train on.
        valid_manifest: cut set (JSONL) to validate on.
        tokenizer: text tokenizer, a `tokenizer.model` or the folder that holds it.
        languages: language codes in the order of the model's outputs; default: those of the train manifest, sorted.
        batch_seconds: bound of (longest audio x utterances) of a training batch; a longer utterance is one by itself.
        valid_batch_seconds: the same for validation; default: batch_seconds.
        max_batch_labels: bound of (longest label sequence x utterances); default: none.
        max_seconds: longer utterances are left out.
        min_seconds: shorter utterances are left out.
        temperature: languages are sampled with p ~ hours^(1/temperature); 1 takes every utterance once an epoch.
        seed: seed of batches and augmentation.
        num_workers: reading processes; 0 reads in the training process.
        augment: waveform augmentation of the training data; null for none.
    """

    def __init__(
        self,
        train_manifest: str,
        valid_manifest: str,
        tokenizer: str,
        languages: list[str] | None = None,
        batch_seconds: float = 60.0,
        valid_batch_seconds: float | None = None,
        max_batch_labels: int | None = None,
        max_seconds: float = 20.0,
        min_seconds: float = 0.1,
        temperature: float = 1.0,
        seed: int = 0,
        num_workers: int = 0,
        augment: AugmentConfig | None = None,
    ) -> None:
        super().__init__()
        if not temperature >= 1:  # it may be no number
            raise MoleError(f"data.temperature: {temperature:g} is below 1, the natural distribution of languages")
        bounds = {"batch_seconds": batch_seconds, "valid_batch_seconds": valid_batch_seconds}
        for name, bound in {**bounds, "max_batch_labels": max_batch_labels}.items():
            if bound is not None and not bound > 0:
                raise MoleError(f"data.{name}: {bound:g} must be positive")
        check_seed(seed, "data.seed")
        check_once(languages or [])
        self.train_manifest = train_manifest
        self.valid_manifest = valid_manifest
        self.tokenizer_path = tokenizer
        self.batch_seconds = batch_seconds
        self.valid_batch_seconds = valid_batch_seconds or batch_seconds
        self.max_batch_labels = max_batch_labels
        self.max_seconds = max_seconds
        self.min_seconds = min_seconds
        self.temperature = temperature
        self.seed = seed
        self.num_workers = num_workers
        self.augment = augment
        self.frame_shift_s = SUBSAMPLING * FRAME_SHIFT_S
        self._languages = languages
        self._manifests: dict[str, Manifest] = {}
        self._datasets: dict[str, SpeechDataset] = {}
        self.selections: dict[str, Selection] = {}
        self.skipped: set[str] = set()

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer, read at first use."""
        return TextTokenizer(self.tokenizer_path)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, blank included."""
        return self.tokenizer.vocab_size

    @cached_property
    def languages(self) -> list[str]:
        """Language codes; an index into them is a language id of a batch.

        Raises:
            MoleError: neither the argument nor the manifest names any.
        """
        found = self._languages or self._manifest("train").languages
        if not found:
            raise MoleError(f"{self.train_manifest}: no utterance has a language; prepare it with --language")
        return found

    def setup(self, stage: str | None = None) -> None:
        """Reads the manifests, tokenises the texts and leaves out what cannot be trained on.

        Raises:
            MoleError: nothing is left of a manifest, and the message counts the reasons; or none of it can be read.
        """
        splits = ("valid",) if stage == "validate" else ("train", "valid")
        for split in splits:
            if split not in self._datasets:
                self._datasets[split], self.selections[split] = self._prepare(split)
                self._check_readable(split)

    def gather_skipped(self) -> None:
        """Lets every process know what the others could not read; all of them must call it."""
        if distributed.is_available() and distributed.is_initialized():
            gathered = [self.skipped] * distributed.get_world_size()
            distributed.all_gather_object(gathered, self.skipped)
            self.skipped.update(*gathered)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to say at its end; Lightning asks all processes at once."""
        self.gather_skipped()
        return {"skipped": sorted(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.skipped.update(state_dict["skipped"])

    def train_dataloader(self) -> PlanLoader:
        """Batches of the current epoch that are still to come."""
        return self._loader("train", lambda: place_of(self.trainer))

    def training_epoch(self, epoch: int) -> PlanLoader:
        """All training batches of an epoch, of all ranks."""
        return self._loader("train", lambda: (epoch, 0), shared=False)

    def val_dataloader(self) -> PlanLoader:
        """All validation batches, longest first, the same every time."""
        return self._loader("valid", lambda: (0, 0))

    def whole_validation(self) -> PlanLoader:
        """All validation batches of all ranks, in each of them."""
        return self._loader("valid", lambda: (0, 0), shared=False)

    def training_labels(self) -> dict[str, list[np.ndarray]]:
        """Label sequences of the utterances that are trained on, by language."""
        dataset, rows = self._datasets["train"], self.selections["train"].rows
        ids = dataset.language_ids[rows]
        return {code: [dataset.labels[row] for row in rows[ids == n]] for n, code in enumerate(self.languages)}

    def _path(self, split: str) -> str:
        return self.train_manifest if split == "train" else self.valid_manifest

    def _manifest(self, split: str) -> Manifest:
        """The manifest of a split, read once."""
        if split not in self._manifests:
            self._manifests[split] = Manifest(self._path(split))
        return self._manifests[split]

    def _prepare(self, split: str) -> tuple[SpeechDataset, Selection]:
        """The dataset of a split, and which of its rows are used."""
        config = self.augment if split == "train" else None
        manifest = self._manifest(split)
        ids = [self.languages.index(code) if code in self.languages else -1 for code in manifest.languages]
        language_ids = np.array([*ids, -1], np.int64)[manifest.language_ids]  # -1, no language, finds the last one
        durations_s = manifest.durations_s.astype(np.float64)
        selection = (
            Selection(np.arange(len(manifest)))
            .without("without a language that the model has", language_ids < 0)
            .without(f"longer than {self.max_seconds:g} s", durations_s > self.max_seconds)
            .without(f"shorter than {self.min_seconds:g} s", durations_s < self.min_seconds)
        )
        labels = LabelTable.tokenize(manifest, selection.rows, self.tokenizer)
        # Speed perturbation makes utterances shorter: the fastest version must still have a frame for every label.
        shortest_s = durations_s * (config.shortest_stretch if config else 1.0)
        frames = np.floor(shortest_s / self.frame_shift_s)
        required = np.array([required_frames(labels[row]) for row in range(len(manifest))], np.int64)
        selection = selection.without("with an empty text", labels.lengths == 0)
        selection = selection.without("with more labels than frames", required > frames)
        if len(selection.rows) == 0:
            raise MoleError(
                f"{self._path(split)}: nothing to {'train' if split == 'train' else 'validate'} on: {selection}"
            )
        if selection.left_out:
            first = ", ".join(manifest[row].id for row in selection.examples.values())
            log.warning("%s: %s (the first of each: %s)", self._path(split), selection, first)
        return SpeechDataset(manifest, labels, language_ids, config, self.seed), selection

    def _check_readable(self, split: str) -> None:
        """Refuses a split of which nothing can be read, as where a disk is missing."""
        first = ""
        for row in self.selections[split].rows:
            utterance = self._manifest(split)[row]
            try:
                utterance.read_whole()
                return
            except (MoleError, OSError) as error:
                first = first or f"{utterance.id}: {error}"
        raise MoleError(f"{self._path(split)}: no readable utterance; {first}")

    def _loader(self, split: str, place: Callable[[], tuple[int, int]], shared: bool = True) -> PlanLoader:
        """Batches of a split from a place on, those of this rank or, not `shared`, of all."""
        dataset, rows, trains = self._datasets[split], self.selections[split].rows, split == "train"
        # Speed perturbation makes utterances longer: the slowest version must fit into the batch.
        stretch = dataset.augment_config.longest_stretch if dataset.augment_config else 1.0
        plan = BatchPlan(
            durations_s=dataset.manifest.durations_s[rows] * stretch,
            text_lengths=dataset.labels.lengths[rows],
            language_ids=dataset.language_ids[rows],
            batch_seconds=self.batch_seconds if trains else self.valid_batch_seconds,
            max_batch_labels=self.max_batch_labels,
            seed=self.seed,
            temperature=self.temperature if trains else 1.0,
            world_size=self.trainer.world_size if self.trainer and shared else 1,
            shuffle=trains,
        )
        rank = self.trainer.global_rank if self.trainer and shared else 0
        return PlanLoader(dataset, plan, rows, rank, self.num_workers, place, self.skipped)
