"""Clocks by hand: what they count, in which order models are timed, and that timing changes no model."""

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mole_asr.text.model import TextModel
from mole_asr.text.timing import StepClock, inference, time_in_turns, training_step
from mole_asr.text.windows import TextBatch

from .conftest import POLICIES, VOCAB_SIZE

Make = Callable[..., TextModel]


def test_the_clock_counts_steps_alone_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, cpu = iter([1.0, 3.0, 10.0, 11.0, 50.0, 54.0]), iter([0.5, 1.0, 2.0, 2.25, 5.0, 6.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu))
    logged: dict[str, list[float]] = {}
    task: Any = SimpleNamespace(log=lambda name, value, batch_size: logged.setdefault(name, []).append(value))
    clock, trainer = StepClock(), SimpleNamespace()
    for step in range(3):
        if step == 2:  # another process goes on
            state, clock = clock.state_dict(), StepClock()
            clock.load_state_dict(state)
        clock.on_train_batch_start(trainer, task, None, step)  # type: ignore[arg-type]
        clock.on_train_batch_end(trainer, task, None, None, step)  # type: ignore[arg-type]
    assert logged == {"train/seconds": [2.0, 3.0, 7.0], "train/cpu_seconds": [0.5, 0.75, 1.75]}


def test_models_have_their_turn_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of three rounds counts, and the first call of each is not among them."""
    took = {"a": [9.0, 1.0, 5.0, 2.0], "b": [9.0, 4.0, 3.0, 8.0]}
    calls: list[str] = []
    now = 0.0

    def job(name: str, seconds: Iterator[float]) -> None:
        nonlocal now
        calls.append(name)
        now += next(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    iterators = {name: iter(seconds) for name, seconds in took.items()}
    jobs = {name: lambda name=name: job(name, iterators[name]) for name in took}
    assert time_in_turns(jobs, 3) == {"a": 2.0, "b": 4.0}
    assert calls == ["a", "b"] * 4


@pytest.mark.parametrize("name", POLICIES)
def test_a_timed_model_stays_as_it_was(make_model: Make, name: str) -> None:
    model = make_model(POLICIES[name]).float()
    tokens_BS = torch.randint(VOCAB_SIZE, (3, 8))
    rows_B = torch.arange(3)
    batch = TextBatch(tokens_BS, torch.ones(3, 8), torch.full((3,), 7), rows_B, rows_B, False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen: list[bool] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    for job in (training_step(model, batch, torch.bfloat16), inference(model, batch, torch.float32)):
        job()
        job()
    assert seen == [True, True, False, False]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
