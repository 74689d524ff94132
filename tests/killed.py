"""A training that is watched, and killed where a test says."""

from typing import Any

import pytest
import torch

from mole_asr.asr import fit as fit_module
from mole_asr.asr.resumable_task import ResumableTask


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` may catch it."""


class Watch:
    """Notes the rows that each training step sees, and can kill the run at the beginning of a step.

    Checkpoints are written at every third step, averages are updated at every second.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, task_class: type[ResumableTask]) -> None:
        self.rows: list[list[int]] = []
        self.kill_at: int | None = None
        step = task_class.training_step

        def training_step(task: ResumableTask, batch: Any, batch_index: int) -> torch.Tensor:
            if task.global_step == self.kill_at:
                raise Killed
            self.rows.append(batch.rows_B.tolist())
            return step(task, batch, batch_index)

        monkeypatch.setattr(task_class, "training_step", training_step)
        monkeypatch.setattr(fit_module, "CHECKPOINT_EVERY_STEPS", 3)
        monkeypatch.setattr(fit_module, "AVERAGE_EVERY_STEPS", 2)
