"""What a language model costs in seconds: a clock for trainings, and models timed in turns on the same batches."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from mole_asr.asr.muon import build_optimizer
from mole_asr.text.figures import nats
from mole_asr.text.model import TextModel
from mole_asr.text.policies import routing_losses
from mole_asr.text.windows import TextBatch

Job = Callable[[], Any]
_LEVELLING = 0.01  # weight of the balance loss in a step that is timed


class StepClock(Callback):
    """Logs what the steps of a training took so far, validation and checkpoints apart.

    `train/seconds` goes by the clock on the wall, `train/cpu_seconds` is of this process, all threads together. A run
    that goes on counts on.

    In a config: `trainer.callbacks: [{class_path: mole_asr.text.timing.StepClock}]`.
    """

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self._start = (0.0, 0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins to count."""
        self._start = (time.perf_counter(), time.process_time())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds this step."""
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]
        pl_module.log("train/seconds", self.seconds, batch_size=1)
        pl_module.log("train/cpu_seconds", self.cpu_seconds, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.seconds, self.cpu_seconds = state_dict["seconds"], state_dict["cpu_seconds"]


def training_step(model: TextModel, batch: TextBatch, precision: torch.dtype) -> Job:
    """A whole step as `fit` makes it, at learning rates of zero, so that each repetition does the same work.

    Args:
        model: a decoder.
        batch: windows without padding, on the model's device.
        precision: of the products.
    """
    optimizer = build_optimizer(model, lr=0.0, adamw_lr=0.0, weight_decay=0.0)
    device = batch.tokens_BS.device.type

    def step() -> None:
        model.train()
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            output = model(batch.tokens_BS[:, :-1], None, batch.languages_B)
            loss = nats(output.logits_BTV, batch.targets()).mean()
            routing = routing_losses(model.policies, output.plans)
        total: Tensor = loss + _LEVELLING * routing.get("balance", 0.0)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: TextModel, batch: TextBatch, precision: torch.dtype) -> Job:
    """One forward over whole windows; the arguments are those of `training_step`."""
    device = batch.tokens_BS.device.type

    @torch.inference_mode()
    def forward() -> None:
        model.eval()
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            model(batch.tokens_BS[:, :-1])

    return forward


def time_in_turns(jobs: Mapping[str, Job], rounds: int) -> dict[str, float]:
    """Median seconds of each job; all have their turn in each round, so that each meets the same machine.

    Args:
        jobs: by name; each runs once before, uncounted.
        rounds: turns of each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(each) for name, each in seconds.items()}
