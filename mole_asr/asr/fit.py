"""The `fit` verb: Lightning's command line with this project's task and data."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from mole_asr.asr.checkpoint import save_model
from mole_asr.asr.task import MoleTask
from mole_asr.corpus.data_module import SpeechDataModule

MODEL_FOLDER = "model"
CHECKPOINT_FOLDER = "checkpoints"
AVERAGE_EVERY_STEPS = 5
CHECKPOINT_EVERY_STEPS = 200


class ExportModel(Callback):
    """Writes the model folder at the end of the training, with the averaged weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports from rank 0; the weights were averaged at the end of the training."""
        assert isinstance(pl_module, MoleTask)
        if trainer.is_global_zero and trainer.state.status != "interrupted":
            save_model(pl_module.model, pl_module.text_tokenizer, self.folder)
            print(f"model written to {self.folder}", file=sys.stderr)


class MoleCLI(LightningCLI):
    """LightningCLI with one more key, `output`: everything of a run goes there, and a run found there goes on."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `output` and `average_decay`, and lets the model take tokenizer, languages and seed from the data."""
        parser.add_argument(
            "--output", type=str, required=True, help="Folder of the run; an interrupted run found there goes on."
        )
        parser.add_argument(
            "--average_decay",
            type=float,
            default=0.98,
            help="Decay of the weight average, updated every 5 steps; validation and export take it; 0: no average.",
        )
        parser.link_arguments("data.tokenizer", "model.tokenizer")
        parser.link_arguments("data.seed", "model.seed")
        parser.link_arguments("data.languages", "model.languages", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that logs, saves and exports under `output`."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        output = Path(config["output"])
        callbacks: list[Callback] = [
            LearningRateMonitor("step"),
            ExportModel(output / MODEL_FOLDER),
            ModelCheckpoint(
                output / CHECKPOINT_FOLDER, save_last=True, save_top_k=0, every_n_train_steps=CHECKPOINT_EVERY_STEPS
            ),
        ]
        if config["average_decay"] > 0:
            average = EMAWeightAveraging(decay=config["average_decay"], update_every_n_steps=AVERAGE_EVERY_STEPS)
            callbacks.insert(0, average)
        configured = self._get(self.config_init, "trainer.callbacks") or []
        return super().instantiate_trainer(
            default_root_dir=str(output),
            logger=[CSVLogger(output, name="logs"), TensorBoardLogger(output, name="tensorboard")],
            callbacks=[*callbacks, *(configured if isinstance(configured, list) else [configured])],
            **kwargs,
        )


def fit(arguments: list[str]) -> None:
    """Trains a model: `--config conf/asr/prompts5.yaml`, any key replaced by `--key value`.

    The same command again resumes an interrupted run where it stopped, in mid-epoch too, and returns at once when the
    run is complete.

    Args:
        arguments: of the command line, behind `fit`.

    Raises:
        MoleError: the data cannot be trained on, or do not fit the run to resume.
    """
    MoleCLI(
        MoleTask,
        SpeechDataModule,
        args=["fit", "--ckpt_path=last", "--weights_only=true", *arguments],
        save_config_kwargs={"overwrite": True},
        seed_everything_default=False,
        auto_configure_optimizers=False,
    )
