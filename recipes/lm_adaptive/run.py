"""Trains, measures and tabulates adaptive gating and its rivals: `python recipes/lm_adaptive/run.py`; see README.md.

For each (system, seed) that results.json lacks: fit, evaluate; the trained top-2 model is also evaluated with other
gates; then all models are timed in turns. Give the same command again after an interruption, or a day later: what is
done stays done.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from plan import BASE, CONTINUED, HERE, REFERENCE, SYSTEMS, THRESHOLDS, System

from mole_asr.errors import MoleError
from mole_asr.score.jobs import do_all
from mole_asr.score.results import ResultFile
from mole_asr.score.runs import (
    add_jobs,
    need_texts,
    origin,
    read_test_texts,
    recipe_parser,
    run_recipe,
    step_words,
    train,
)
from mole_asr.text.checkpoint import LanguageModel, load_text_model
from mole_asr.text.evaluate import evaluate
from mole_asr.text.policies import ExpertsConfig
from mole_asr.text.report import quality, training
from mole_asr.text.timing import inference, time_in_turns, training_step
from mole_asr.text.upcycle import upcycle
from mole_asr.text.windows import TextBatch, pack_windows

WINDOWS = 64  # of each language, of the test split
ROUNDS = 15  # turns of each model that is timed
_SPLITS = {"train": "train", "valid": "dev"}


def config() -> dict[str, Any]:
    """The base of all systems."""
    return yaml.safe_load(BASE.read_text(encoding="utf-8"))


def steps_of(system: System, options: argparse.Namespace) -> int:
    """Steps of its training."""
    last = yaml.safe_load(CONTINUED.read_text(encoding="utf-8")) if system.goes_on else config()
    return options.steps or last["trainer"]["max_steps"]


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Of a training."""
    return options.runs / name / f"seed{seed}"


def trained(names: Sequence[str], seed: int, options: argparse.Namespace) -> dict[str, LanguageModel]:
    """The models of earlier trainings, by system.

    Raises:
        MoleError: some are gone.
    """
    folders = {name: folder_of(name, seed, options) / "model" for name in names}
    if missing := [name for name, folder in folders.items() if not folder.exists()]:
        raise MoleError(
            f"{options.runs}: holds no model of {', '.join(missing)}, seed {seed}, which is needed; train it (after "
            f"taking its rows out of {options.results / 'results.json'}, where it has some)"
        )
    return {name: load_text_model(folder) for name, folder in folders.items()}


def add_rows(rows: Sequence[dict[str, Any]], results: ResultFile) -> None:
    """Writes rows at once, with their origin."""
    facts = origin(HERE.parents[1])
    results.add([row | facts for row in rows])


def measure(system: System, seed: int, options: argparse.Namespace, results: ResultFile) -> None:
    """Trains and evaluates one system."""
    print(f"\n== {system.name}, seed {seed}", flush=True)
    folder, data, trainer = folder_of(system.name, seed, options), config()["data"], config()["trainer"]
    words = [f"--config={path}" for path in system.config_paths]
    words += [*system.words, f"--data.seed={seed}"]
    words += [] if options.steps is None else step_words(options.steps, trainer)
    words += [f"--data.{key}_texts={options.data / f'texts_{split}.jsonl'}" for key, split in _SPLITS.items()]
    if system.goes_on:
        trained([REFERENCE], seed, options)
        words.append(f"--model.init_from={folder_of(REFERENCE, seed, options) / 'model'}")
    train(folder, words)
    model = load_text_model(folder / "model")
    found = evaluate(model, read_test_texts(options.data, data["languages"]), WINDOWS)
    row = {"system": system.name, "seed": seed, "kind": "quality", "steps": steps_of(system, options)}
    row |= quality(model, found) | training(folder, model, found, data["window"] * data["batch_windows"])
    add_rows([row], results)
    print(f"{row['bits_per_byte']:.4f} bits a byte", flush=True)


def measure_gates(seed: int, options: argparse.Namespace, results: ResultFile) -> None:
    """Gives the trained top-2 model, whose weights stay as they are, the gate of adaptive gating with each threshold.

    Which tokens gain by their second expert, those of two near scores? By nothing else do these models differ.
    """
    top_2 = trained([REFERENCE], seed, options)[REFERENCE]
    texts = read_test_texts(options.data, config()["data"]["languages"])
    rows = []
    for threshold in THRESHOLDS:
        experts = ExpertsConfig("adaptive", num_experts=top_2.model.experts[0].num_experts, threshold=threshold)
        model = upcycle(top_2.model, [experts], top_2.model.languages).eval()
        gated = replace(top_2, model=model)
        row = {"system": f"gate-{threshold:g}", "seed": seed, "kind": "gate", "threshold": threshold}
        rows.append(row | quality(gated, evaluate(gated, texts, WINDOWS)))
    add_rows(rows, results)


def batch_of(texts: dict[str, Sequence[str]], settings: dict[str, Any], vocabulary: Any) -> TextBatch:
    """A batch of test windows as the training has them: of all languages."""
    windows = pack_windows(texts, list(texts), vocabulary, settings["window"], fill=True)
    chosen = windows.thinned(-(-settings["batch_windows"] // len(texts)), seed=0)
    return chosen.batch(np.arange(len(chosen))[: settings["batch_windows"]])


def measure_speed(names: list[str], options: argparse.Namespace, results: ResultFile) -> None:
    """Times one training step and one forward of all trained models, in turns, with one batch of test texts."""
    seed = options.seeds[0]
    models = trained(names, seed, options)  # only times of one session can be compared
    data = config()["data"]
    precision = torch.bfloat16 if config()["trainer"]["precision"].startswith("bf16") else torch.float32
    batch = batch_of(read_test_texts(options.data, data["languages"]), data, next(iter(models.values())).vocabulary)
    seconds: dict[str, dict[str, float]] = {name: {} for name in models}
    for kind, make in (("forward", inference), ("step", training_step)):
        jobs = {name: make(each.model, batch, precision) for name, each in models.items()}
        for name, median in time_in_turns(jobs, ROUNDS).items():
            seconds[name][f"{kind}_ms"] = round(1000 * median, 2)
    facts = {"seed": seed, "kind": "speed", "tokens": int(batch.lengths_B.sum()), "threads": torch.get_num_threads()}
    add_rows([{"system": name, **facts, **each} for name, each in seconds.items()], results)


def measure_all(options: argparse.Namespace, results: ResultFile) -> None:
    """What results.json lacks; all models are timed anew when one is new."""
    calls = [
        (SYSTEMS[name], seed, options, results)
        for seed in options.seeds
        for name in options.systems
        if results.lacks(steps_of(SYSTEMS[name], options), system=name, seed=seed, kind="quality")
    ]
    if calls:
        need_texts(options.data, options.source)
    do_all(measure, [call for call in calls if not call[0].goes_on], options.jobs)
    do_all(measure, [call for call in calls if call[0].goes_on], options.jobs)  # they go on from those
    results.read()
    for seed in options.seeds:
        if results.select(system=REFERENCE, seed=seed) and not results.select(kind="gate", seed=seed):
            measure_gates(seed, options, results)
    timed = {row["system"] for row in results.select(kind="speed")}
    names = [
        name
        for name, system in SYSTEMS.items()
        if not system.goes_on and results.select(system=name, seed=options.seeds[0], kind="quality")
    ]
    if options.speed or set(names) - timed:
        measure_speed(names, options, results)


def main(words: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0, or 1 where something is wrong that the user can put right.
    """
    parser = recipe_parser(__doc__ or "", HERE, "data/texts")
    add_jobs(parser)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--speed", action="store_true", help="time all models anew, on a machine that is not in use")
    options = parser.parse_args(words)
    from pictures import draw
    from tables import write_tables

    return run_recipe(options, ("system", "seed", "kind"), measure_all, draw, write_tables)


if __name__ == "__main__":
    sys.exit(main())
