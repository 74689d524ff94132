"""Training and validation batches of texts: which windows, in which order, and where a resumed run goes on."""

import logging
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor

from mole_asr.arguments import check_once, check_seed
from mole_asr.corpus.batch_plan import BatchPlan
from mole_asr.corpus.languages import MAJOR_LANGUAGES
from mole_asr.corpus.loader import PlacedLoader, place_of
from mole_asr.corpus.texts import read_texts
from mole_asr.errors import MoleError
from mole_asr.text.curriculum import Complexities
from mole_asr.text.vocabulary import Vocabulary, load_vocabulary
from mole_asr.text.windows import TextBatch, Windows, pack_windows

log = logging.getLogger(__name__)


class CurriculumPlan(BatchPlan):
    """A plan whose epochs can follow a curriculum, of as many batches; the "seconds" of a batch are its windows."""

    def ordered_batches(self, epoch: int, order: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        """The batches of one epoch, sorted inside by language.

        Args:
            epoch: its number.
            order: puts positions int64[n] into the order in which they are trained on.
        """
        rng = np.random.default_rng((self.seed, epoch))
        rows = order(rng.permutation(self._epoch_rows(rng)))
        batches = np.split(rows, range(int(self.batch_seconds), len(rows), int(self.batch_seconds)))
        return [batch[np.argsort(self.language_ids[batch], kind="stable")] for batch in batches]


class WindowLoader(PlacedLoader):
    """Iterates over batches of windows.

    Args:
        windows: of all languages.
        batches: the batches of an epoch, as numbers of windows.
        num_batches: of every epoch.
        place: returns (epoch, next batch).
    """

    def __init__(
        self,
        windows: Windows,
        batches: Callable[[int], list[np.ndarray]],
        num_batches: int,
        place: Callable[[], tuple[int, int]],
    ) -> None:
        super().__init__(num_batches, place, "windows")
        self.windows, self._batches = windows, batches

    def __iter__(self) -> Iterator[TextBatch]:
        epoch, first = self.place()
        for rows in self._batches(epoch)[first:]:
            yield self.windows.batch(rows)


class TextDataModule(LightningDataModule):
    """Training and validation windows from two files of texts.

    Args:
        train_texts: JSONL to train on, lines with "text" and "language".
        valid_texts: JSONL to validate on.
        vocabulary: "bytes", or a sentencepiece model or its folder (`mole-asr tokenizer train`).
        languages: codes to take; default: those of the train texts, sorted.
        major_languages: codes whose mean is shown apart from that of the others; default: twelve large ones.
        window: tokens of a window.
        batch_windows: windows of a training batch.
        valid_batch_windows: windows of a validation batch; default: batch_windows.
        windows_per_language: at most so many training windows a language, chosen at random; default: all.
        valid_windows_per_language: the same for validation.
        temperature: languages are sampled with p ~ tokens^(1/temperature); 1 takes every window once an epoch.
        curriculum: order windows by how many of their tokens needed a second expert (policy "adaptive").
        seed: of the order of the training windows, and of their choice.
    """

    def __init__(
        self,
        train_texts: str,
        valid_texts: str,
        vocabulary: str = "bytes",
        languages: list[str] | None = None,
        major_languages: list[str] | None = None,
        window: int = 256,
        batch_windows: int = 16,
        valid_batch_windows: int | None = None,
        windows_per_language: int | None = None,
        valid_windows_per_language: int | None = None,
        temperature: float = 1.0,
        curriculum: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.window, self.batch_windows = window, batch_windows
        self.valid_batch_windows = batch_windows if valid_batch_windows is None else valid_batch_windows
        self.per_language = {"train": windows_per_language, "valid": valid_windows_per_language}
        numbers = {"window": window, "batch_windows": batch_windows, "valid_batch_windows": valid_batch_windows}
        numbers |= {f"{'valid_' * (split == 'valid')}windows_per_language": n for split, n in self.per_language.items()}
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise MoleError(f"data.{name}: {number} must be positive")
        check_seed(seed, "data.seed")
        check_once(languages or [])
        if not temperature >= 1:  # it may be no number
            raise MoleError(f"data.temperature: {temperature:g} is below 1, the natural distribution of languages")
        self.paths = {"train": train_texts, "valid": valid_texts}
        self.vocabulary_name = vocabulary
        self.temperature, self.curriculum, self.seed = temperature, curriculum, seed
        self._languages, self._major = languages, major_languages
        self._texts: dict[str, dict[str, list[str]]] = {}
        self.windows: dict[str, Windows] = {}
        self.complexities: Complexities | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, read at first use."""
        return load_vocabulary(self.vocabulary_name)

    @cached_property
    def languages(self) -> list[str]:
        """Codes; an index into them is a label.

        Raises:
            MoleError: there are none, or the train texts lack one.
        """
        found = self._read("train")
        if missing := [code for code in self._languages or [] if code not in found]:
            raise MoleError(f"data.languages: {self.paths['train']} has no text in {', '.join(missing)}")
        if not found:
            raise MoleError(f"{self.paths['train']}: nothing to train on: it holds no text")
        return self._languages or list(found)

    @property
    def major_languages(self) -> list[str]:
        """Those of the languages that are shown as major."""
        major = MAJOR_LANGUAGES if self._major is None else self._major
        return [code for code in self.languages if code in major or code.partition("-")[0] in major]

    def _read(self, split: str) -> dict[str, list[str]]:
        if split not in self._texts:
            self._texts[split] = read_texts(self.paths[split])
        return self._texts[split]

    def setup(self, stage: str | None = None) -> None:
        """Reads and packs the texts.

        Raises:
            MoleError: nothing is left to train or to validate on, or the curriculum would need one process.
        """
        for split in ("valid",) if stage == "validate" else ("train", "valid"):
            if split in self.windows:
                continue
            texts = {code: texts for code, texts in self._read(split).items() if code in self.languages}
            if self._languages is None and (others := [code for code in self._read(split) if code not in texts]):
                log.warning("%s: left out are texts in %s, which train lacks", self.paths[split], ", ".join(others))
            if not texts:
                use = "train" if split == "train" else "validate"
                raise MoleError(f"{self.paths[split]}: nothing to {use} on: no text in the languages of the model")
            packed = pack_windows(texts, self.languages, self.vocabulary, self.window, fill=split == "train")
            # Trainings of all seeds are validated on the same texts.
            self.windows[split] = packed.thinned(self.per_language[split], self.seed if split == "train" else 0)
            del self._texts[split]
        if self.curriculum and self.complexities is None and "train" in self.windows:
            if self.trainer is not None and self.trainer.world_size > 1:
                raise MoleError("data.curriculum: works in one process only; give trainer.devices 1")
            self.complexities = Complexities(len(self.windows["train"]))

    def train_dataloader(self) -> WindowLoader:
        """Batches of the current epoch that are still to come."""
        windows, rank = self.windows["train"], self.trainer.global_rank if self.trainer else 0
        plan = self._plan(windows, self.batch_windows, self.temperature)

        def batches(epoch: int) -> list[np.ndarray]:
            complexities = self.complexities
            if complexities is None:
                return plan.batches(epoch, rank)
            return plan.ordered_batches(epoch, lambda rows: complexities.order(epoch, rows))

        return WindowLoader(windows, batches, plan.num_batches, lambda: place_of(self.trainer))

    def val_dataloader(self) -> WindowLoader:
        """All validation batches, the same every time."""
        windows, rank = self.windows["valid"], self.trainer.global_rank if self.trainer else 0
        plan = self._plan(windows, self.valid_batch_windows, shuffle=False)
        return WindowLoader(windows, lambda epoch: plan.batches(epoch, rank), plan.num_batches, lambda: (0, 0))

    def _plan(
        self, windows: Windows, batch_windows: int, temperature: float = 1.0, shuffle: bool = True
    ) -> CurriculumPlan:
        return CurriculumPlan(
            durations_s=windows.lengths_W / self.window,
            text_lengths=windows.lengths_W,
            language_ids=windows.languages_W,
            batch_seconds=batch_windows,
            seed=self.seed,
            temperature=temperature,
            world_size=self.trainer.world_size if self.trainer else 1,
            shuffle=shuffle,
        )

    def record(self, rows_B: Tensor, shares_BL: Tensor) -> None:
        """Notes the complexity vectors of a training batch, for the curriculum of the next epoch."""
        assert self.complexities is not None and self.trainer is not None
        self.complexities.record(self.trainer.current_epoch, rows_B, shares_BL)

    def state_dict(self) -> dict[str, Any]:
        """The complexity vectors, for a checkpoint; nothing else has a state."""
        return self.complexities.state_dict() if self.complexities else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The complexity vectors of a checkpoint."""
        if self.complexities is not None:
            self.complexities.load_state_dict(state_dict)
