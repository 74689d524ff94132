"""Trains, measures and tabulates adaptive gating and its rivals: `python recipes/lm_adaptive/run.py`; see README.md.

For each (system, seed) that results.json lacks: fit, evaluate; then all models are timed in turns. Give the same
command again after an interruption, or a day later: what is done stays done.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any

import numpy as np
import torch
import yaml
from plan import BASE, HERE, SYSTEMS, System

from mole_asr.errors import MoleError
from mole_asr.score.jobs import do_all
from mole_asr.score.results import ResultFile
from mole_asr.score.runs import (
    add_jobs,
    code_version,
    need_texts,
    read_test_texts,
    recipe_parser,
    run_recipe,
    step_words,
    train,
)
from mole_asr.text.checkpoint import load_text_model
from mole_asr.text.evaluate import evaluate
from mole_asr.text.report import quality, training
from mole_asr.text.timing import inference, time_in_turns, training_step
from mole_asr.text.windows import TextBatch, pack_windows

WINDOWS = 64  # of each language, of the test split
ROUNDS = 15  # turns of each model that is timed
_SPLITS = {"train": "train", "valid": "dev"}


def config() -> dict[str, Any]:
    """The base of all systems."""
    return yaml.safe_load(BASE.read_text(encoding="utf-8"))


def steps_of(options: argparse.Namespace) -> int:
    """Steps of each training."""
    return options.steps or config()["trainer"]["max_steps"]


def measure(system: System, seed: int, options: argparse.Namespace, results: ResultFile) -> None:
    """Trains and evaluates one system."""
    steps = steps_of(options)
    print(f"\n== {system.name}, seed {seed}", flush=True)
    folder = options.runs / system.name / f"seed{seed}"
    words = [f"--config={path}" for path in (BASE, system.config_path)]
    words += [*system.words, f"--data.seed={seed}"]
    words += [f"--trainer.max_steps={steps}"] if options.steps is None else step_words(steps, config()["trainer"])
    texts = {f"--data.{key}_texts": options.data / f"texts_{split}.jsonl" for key, split in _SPLITS.items()}
    train(folder, words + [f"{key}={path}" for key, path in texts.items()])
    model = load_text_model(folder / "model")
    found = evaluate(model, read_test_texts(options.data, config()["data"]["languages"]), WINDOWS)
    tokens = config()["data"]["window"] * config()["data"]["batch_windows"]
    row = {"system": system.name, "seed": seed, "kind": "quality", "steps": steps}
    row |= quality(model, found) | training(folder, model, found, tokens)
    results.add([row | {"commit": code_version(HERE.parents[1]), "date": date.today().isoformat()}])
    print(f"{row['bits_per_byte']:.4f} bits a byte", flush=True)


def batch_of(texts: dict[str, Sequence[str]], settings: dict[str, Any], vocabulary: Any) -> TextBatch:
    """A batch of test windows as the training has them: of all languages."""
    windows = pack_windows(texts, list(texts), vocabulary, settings["window"], fill=True)
    chosen = windows.thinned(-(-settings["batch_windows"] // len(texts)), seed=0)
    return chosen.batch(np.arange(len(chosen))[: settings["batch_windows"]])


def measure_speed(names: list[str], options: argparse.Namespace, results: ResultFile) -> None:
    """Times one training step and one forward of all trained models, in turns, with one batch of test texts."""
    seed = options.seeds[0]
    folders = {name: options.runs / name / f"seed{seed}" / "model" for name in names}
    # Only times of one session can be compared.
    if missing := [name for name, folder in folders.items() if not folder.exists()]:
        raise MoleError(
            f"{options.runs}: holds no model of {', '.join(missing)} to time beside the others; take its rows out of "
            f"{results.path} to train it anew"
        )
    models = {name: load_text_model(folder) for name, folder in folders.items()}
    data = config()["data"]
    precision = torch.bfloat16 if config()["trainer"]["precision"].startswith("bf16") else torch.float32
    batch = batch_of(read_test_texts(options.data, data["languages"]), data, next(iter(models.values())).vocabulary)
    seconds: dict[str, dict[str, float]] = {name: {} for name in models}
    for kind, make in (("forward", inference), ("step", training_step)):
        jobs = {name: make(each.model, batch, precision) for name, each in models.items()}
        for name, median in time_in_turns(jobs, ROUNDS).items():
            seconds[name][f"{kind}_ms"] = round(1000 * median, 2)
    facts = {"seed": seed, "kind": "speed", "tokens": int(batch.lengths_B.sum()), "threads": torch.get_num_threads()}
    facts |= {"commit": code_version(HERE.parents[1]), "date": date.today().isoformat()}
    results.add([{"system": name, **facts, **each} for name, each in seconds.items()])


def measure_all(options: argparse.Namespace, results: ResultFile) -> None:
    """What results.json lacks; all models are timed anew when one is new."""
    steps = steps_of(options)
    if others := sorted({row["steps"] for row in results.rows if "steps" in row} - {steps}):
        raise MoleError(f"{results.path}: its rows come from {others[0]} steps, not {steps}: give --steps {others[0]}")
    calls = [
        (SYSTEMS[name], seed, options, results)
        for seed in options.seeds
        for name in options.systems
        if not results.select(system=name, seed=seed, kind="quality")
    ]
    if calls:
        need_texts(options.data, options.source)
    do_all(measure, calls, options.jobs)
    results.read()
    timed = {row["system"] for row in results.select(kind="speed")}
    names = [name for name in SYSTEMS if results.select(system=name, seed=options.seeds[0], kind="quality")]
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
