"""The `fit` verb for language models: the command line of `asr/fit.py` with the task and the data of texts."""

from dataclasses import fields

from lightning.pytorch import LightningModule, Trainer

from mole_asr.asr.fit import ExportModel, MoleCLI, run
from mole_asr.text.checkpoint import save_text_model
from mole_asr.text.data import TextDataModule
from mole_asr.text.policies import ExpertsConfig
from mole_asr.text.task import TextTask


class ExportTextModel(ExportModel):
    """Writes a language model."""

    def save(self, trainer: Trainer, task: LightningModule) -> None:
        """Writes the folder."""
        assert isinstance(task, TextTask)
        save_text_model(task.language_model(), self.folder)


class TextCLI(MoleCLI):
    """The command line of language models."""

    export = ExportTextModel
    links = ("vocabulary", "window", "seed")
    late_links = ("languages", "major_languages")
    inner_keys = tuple(f"model.more_experts.{field.name}" for field in fields(ExpertsConfig))


def fit(arguments: list[str]) -> None:
    """Trains a language model: `--config conf/text/adaptive.yaml`, any key replaced by `--key value`.

    The same command again resumes an interrupted run where it stopped, in mid-epoch too, and returns at once when the
    run is complete.

    Args:
        arguments: of the command line, behind `fit`.

    Raises:
        MoleError: the data cannot be trained on, or they or the sizes of the model do not fit the run to resume.
        KeyboardInterrupt: after Ctrl-C; the same command goes on from the last checkpoint.
    """
    run(TextCLI, TextTask, TextDataModule, arguments)
