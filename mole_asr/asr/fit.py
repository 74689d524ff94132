"""The `fit` verb: Lightning's command line with this project's task and data."""

import logging
import re
import sys
import warnings
import zipfile
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from mole_asr.arguments import check_seed, explain
from mole_asr.asr.checkpoint import save_model
from mole_asr.asr.familiarity import remember
from mole_asr.asr.generations import temper
from mole_asr.asr.replay import hear_examples
from mole_asr.asr.task import MoleTask
from mole_asr.audio.augment import AugmentConfig
from mole_asr.corpus.data_module import SpeechDataModule
from mole_asr.decode.ngram import TokenNgram, save_ngrams
from mole_asr.errors import MoleError, print_skipped
from mole_asr.files import check_folder

MODEL_FOLDER = "model"
CHECKPOINT_FOLDER = "checkpoints"
AVERAGE_EVERY_STEPS = 5
CHECKPOINT_EVERY_STEPS = 200
MOST_TEXTS = 100_000  # of a language, whose n-grams are counted
# Said by libraries at each start, about what is meant to be so.
_EXPECTED_WARNINGS = (
    "LightningCLI's args parameter",
    ".*there is no last checkpoint available",
    "Checkpoint directory .* exists and is not empty",
    "Precision .* is not supported by the model summary",
    ".*isinstance\\(treespec, LeafSpec\\)",
)


class AverageWeights(WeightAveraging):
    """Exponential moving average of the weights, updated every few steps.

    Lightning's own adds two products, whose rounding changes what stood still; so a frozen weight would not keep its
    bits.

    The first averages are of few steps, so that a short run does not end with the weights that it began with.

    Args:
        decay: weight of the old average.
    """

    def __init__(self, decay: float) -> None:
        def mixed(average: Tensor, now: Tensor, updates: Tensor | int) -> Tensor:
            share = max(1 - decay, 9 / (10 + int(updates)))
            return average.lerp(now, share) if now.is_floating_point() else now

        super().__init__(avg_fn=mixed)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether this is a step to update at."""
        return step_idx is not None and step_idx % AVERAGE_EVERY_STEPS == 0


class ExportModel(Callback):
    """Writes the model folder at the end of the training, with the averaged weights.

    Args:
        folder: to write.
        average: the callback that averages, if one does.
    """

    def __init__(self, folder: Path, average: WeightAveraging | None) -> None:
        self.folder = folder
        self.average = average

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports from rank 0.

        Raises:
            MoleError: the training has diverged.
        """
        _check_finite(pl_module)
        if self.average is not None:
            # Once more: Lightning does not do it when a complete run is started again.
            self.average.on_train_end(trainer, pl_module)
        self.finish(trainer, pl_module)
        if trainer.is_global_zero:
            self.save(trainer, pl_module)
            print(f"model written to {self.folder}", file=sys.stderr)

    def finish(self, trainer: Trainer, task: LightningModule) -> None:
        """What all ranks do before."""

    def save(self, trainer: Trainer, task: LightningModule) -> None:
        """Writes the folder."""
        raise NotImplementedError


def _check_finite(task: LightningModule) -> None:
    if not all(parameter.isfinite().all() for parameter in task.parameters()):
        raise MoleError(
            "the training has diverged, its weights are no numbers: lower the learning rates (model.optimizer, "
            "model.fine_tuning), or give trainer.gradient_clip_val, and another --output"
        )


class ExportRecogniser(ExportModel):
    """Writes a recogniser, n-grams of the training texts, and what the language tokenizer heard in validation."""

    _examples: Mapping[str, Tensor] | None = None  # heard by `finish`

    def finish(self, trainer: Trainer, task: LightningModule) -> None:
        """Gives a new language its threshold; all ranks hear what each could not read."""
        assert isinstance(task, MoleTask)
        trainer.datamodule.gather_skipped()  # type: ignore[attr-defined]
        if task.freeze_old:
            # A threshold changes no hidden vector: what is heard now is what will be written.
            self._examples = {**self._hear(trainer, task), **task.old_examples}
            remember(task.model, self._examples)  # so that it hears as it will when it is loaded
            temper(task.model, trainer.datamodule.whole_validation())  # type: ignore[attr-defined]

    def save(self, trainer: Trainer, task: LightningModule) -> None:
        """Writes the folder."""
        assert isinstance(task, MoleTask)
        old, new = task.old_ngrams, _count_ngrams(trainer)
        # What is frozen keeps its n-grams too: there may be a few old utterances among the new ones.
        save_ngrams({**new, **old} if task.freeze_old else {**old, **new}, self.folder)
        task.blend_with_pretrained()
        _check_finite(task)
        examples = self._hear(trainer, task) if self._examples is None else self._examples
        save_model(task.model, task.text_tokenizer, self.folder, examples)

    def _hear(self, trainer: Trainer, task: MoleTask) -> dict[str, Tensor]:
        """Examples of each language of the validation data."""
        with trainer.precision_plugin.val_step_context():
            return hear_examples(task.model, trainer.datamodule.whole_validation())  # type: ignore[attr-defined]


def _count_ngrams(trainer: Trainer) -> dict[str, TokenNgram]:
    """N-grams of the training texts, of each language that has any; of a large corpus, of some of them."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, SpeechDataModule)
    return {
        language: TokenNgram.count(texts[:: 1 + len(texts) // MOST_TEXTS], data.vocab_size)
        for language, texts in data.training_labels().items()
        if texts
    }


class MoleCLI(LightningCLI):
    """LightningCLI with one more key, `output`: everything of a run goes there, and a run found there goes on.

    This one trains recognisers; a subclass says what is linked and exported for other models.

    Attributes:
        export: the callback that writes the model folder.
        links: keys of the data that the model takes.
        late_links: those of them that are known when the data are read.
        inner_keys: those that the parser does not list, as they are inside of a value.
    """

    export: type[ExportModel] = ExportRecogniser
    links: tuple[str, ...] = ("tokenizer", "seed")
    late_links: tuple[str, ...] = ("languages",)
    inner_keys: tuple[str, ...] = tuple(f"data.augment.{field.name}" for field in fields(AugmentConfig))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `output` and `average_decay`, and lets the model take what it shares with the data."""
        parser.add_argument(
            "--output", type=str, required=True, help="Folder of the run; an interrupted run found there goes on."
        )
        parser.add_argument(
            "--average_decay",
            type=float,
            default=0.98,
            help="Decay of the weight average, updated every 5 steps; validation and export take it; 0: no average.",
        )
        for key in self.links:
            parser.link_arguments(f"data.{key}", f"model.{key}")
        for key in self.late_links:
            parser.link_arguments(f"data.{key}", f"model.{key}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line; instead of all options, it prints the one that is wrong.

        Raises:
            MoleError: a key or a value is wrong.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            known = [*self._parser("fit").get_defaults().keys(), *self.inner_keys]
            raise MoleError(explain(str(error), known)) from None
        seed = self.config[self.config["subcommand"]]["seed_everything"]
        check_seed(int(seed or 0), "seed_everything", most=2**32 - 1)  # numpy's

    def instantiate_classes(self) -> None:
        """Tells the data how long a frame of the model is, as every label needs one."""
        super().instantiate_classes()
        if isinstance(self.datamodule, SpeechDataModule):
            self.datamodule.frame_shift_s = self.model.model.frame_shift_s

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that logs, saves and exports under `output`."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        output = Path(config["output"])
        check_folder(output)
        last = output / CHECKPOINT_FOLDER / "last.ckpt"
        if config["ckpt_path"] == "last" and last.is_file() and not zipfile.is_zipfile(last):
            raise MoleError(f"{last}: cannot be read, it is cut off; remove it to train anew")
        average = None
        if not 0 <= config["average_decay"] < 1:
            raise MoleError(f"average_decay: {config['average_decay']:g} must be from 0 to below 1")
        if config["average_decay"] > 0:
            average = AverageWeights(config["average_decay"])
        callbacks: list[Callback] = [
            *([average] if average else []),
            LearningRateMonitor("step"),
            self.export(output / MODEL_FOLDER, average),
            # At the end of an epoch too, so that a complete run is not trained further when it is started again.
            _last_checkpoint(output, every_n_train_steps=CHECKPOINT_EVERY_STEPS),
            _last_checkpoint(output, every_n_epochs=1, save_on_train_epoch_end=True),
        ]
        configured = self._get(self.config_init, "trainer.callbacks") or []
        return super().instantiate_trainer(
            default_root_dir=str(output),
            logger=[CSVLogger(output, name="logs"), TensorBoardLogger(output, name="tensorboard")],
            callbacks=[*callbacks, *(configured if isinstance(configured, list) else [configured])],
            **kwargs,
        )


def _explain_trainer(message: str) -> str:
    """One line for a complaint of Lightning's trainer."""
    if found := re.search(r"current_epoch=\d+.*max_epochs=(\d+)", message):
        return f"trainer.max_epochs: the run to resume has more epochs than {found[1]}: give more, or another --output"
    return " ".join(message.split())


def find_config(word: str) -> str:
    """A config that is not here is taken from the installed package: `conf/asr/prompts5.yaml` works in any folder."""
    name = word.removeprefix("--config=")
    packaged = files("mole_asr.conf").joinpath(name.removeprefix("conf/"))
    if name.startswith("conf/") and not Path(name).exists() and packaged.is_file():
        return word.removesuffix(name) + str(packaged)
    return word


def _last_checkpoint(output: Path, **when: Any) -> ModelCheckpoint:
    """Keeps one checkpoint, `last.ckpt`.

    Not with `save_last`: that saves once more at the end, when the average has taken the place of the weights.
    """
    return ModelCheckpoint(output / CHECKPOINT_FOLDER, filename="last", enable_version_counter=False, **when)


@dataclass(frozen=True)
class FitResult:
    """What a training leaves to say.

    Attributes:
        failures: "id: reason" of each utterance that could not be read and was skipped, by any process, in this call
            or in those that the run goes on from.
    """

    failures: list[str]


def fit(arguments: list[str]) -> FitResult:
    """Trains a model: `--config conf/asr/prompts5.yaml`, any key replaced by `--key value`.

    The same command again resumes an interrupted run where it stopped, in mid-epoch too; where the run is complete it
    only writes the model once more (with `model.fine_tuning.pretrained_share` that takes some minutes).

    Args:
        arguments: of the command line, behind `fit`.

    Returns:
        What was skipped; it is named on standard error too.

    Raises:
        MoleError: the data cannot be trained on, or they or the sizes of the model do not fit the run to resume.
        KeyboardInterrupt: after Ctrl-C; the same command goes on from the last checkpoint.
    """
    done = run(MoleCLI, MoleTask, SpeechDataModule, arguments)
    assert isinstance(done.datamodule, SpeechDataModule)
    failures = sorted(done.datamodule.skipped) if done.trainer.is_global_zero else []  # it knows those of all ranks
    print_skipped(failures)
    return FitResult(failures)


def run(
    cli: type[MoleCLI], task: type[LightningModule], data: type[LightningDataModule], arguments: list[str]
) -> MoleCLI:
    """Trains with this command line, task and data; see `fit`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # below are devices and advertisements
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        try:
            done = cli(
                task,
                data,
                args=["fit", "--ckpt_path=last", "--weights_only=true", *map(find_config, arguments)],
                save_config_kwargs={"overwrite": True},
                seed_everything_default=False,
                auto_configure_optimizers=False,
                parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
            )
        except MisconfigurationException as error:
            raise MoleError(_explain_trainer(str(error))) from None
        except SystemExit as end:  # Lightning makes this of a KeyboardInterrupt
            if isinstance(end.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    return done
