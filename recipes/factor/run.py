"""Factorises trained models and measures what they keep and how fast they are; see README.md.

`python recipes/factor/run.py` trains the language model if it is missing, then cuts, trains for some steps and
measures each (model, split, router, active) that results.json lacks. Give the same command again after an interruption:
what is done stays done.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from plan import BASE, CONFIG, CUT_ROWS, HERE, LR, MODELS, ROUNDS, WAYS, Model, Way

from mole_asr.convert.factor import KINDS, train_slices
from mole_asr.convert.host import open_host
from mole_asr.convert.slicing import Cut, slice_parts
from mole_asr.convert.sweep import Bench, at_hand, check_settings
from mole_asr.errors import MoleError
from mole_asr.score.jobs import do_all
from mole_asr.score.results import ResultFile
from mole_asr.score.runs import add_jobs, need_texts, origin, positive_number, recipe_parser, run_recipe, train

KEY = ("model", "split", "slices", "router", "active")
DENSE = {"split": "dense", "slices": 1, "router": "dense", "active": 1}


def settings_of(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """What decides about the rows of a model, beside their keys."""
    settings = {
        "device": options.device,
        "seed": options.seeds[0],
        "rows": options.rows or model.rows,
        "test_rows": options.rows or model.test_rows,
        "steps": options.tuning_steps or model.steps,
        "lr": LR,
    }
    if model.kind == "text":
        config = yaml.safe_load(BASE.read_text(encoding="utf-8"))
        settings["model_steps"] = options.steps or config["trainer"]["max_steps"]
    return settings


def folder_of(model: Model, options: argparse.Namespace) -> Path:
    """The folder of a dense model; a language model is trained where it is missing."""
    if model.kind == "speech":
        return options.speech
    need_texts(options.data, options.source)
    steps = settings_of(model, options)["model_steps"]
    words = [
        f"--config={BASE}",
        f"--config={CONFIG}",
        f"--trainer.max_steps={steps}",
        f"--data.seed={options.seeds[0]}",
    ]
    texts = {"train": "train", "valid": "dev"}
    words += [f"--data.{key}_texts={options.data / f'texts_{split}.jsonl'}" for key, split in texts.items()]
    train(options.runs / model.name, words)
    return options.runs / model.name / "model"


def lacking(model: Model, results: ResultFile) -> list[Way]:
    """Ways of a model that results.json lacks."""
    return [way for way in WAYS if not results.select(model=model.name, **_columns(way))]


def measure(model: Model, options: argparse.Namespace, results: ResultFile) -> None:
    """All ways of a model that results.json lacks."""
    settings, seed = settings_of(model, options), options.seeds[0]
    host = open_host(folder_of(model, options), options.device)
    data = {
        split: str(options.data / f"texts_{split}.jsonl" if model.kind == "text" else options.speech_data / name)
        for split, name in (("train", "cuts_train.jsonl"), ("test", "cuts_test.jsonl"))
    }
    batches = host.read_all(data["train"], settings["rows"], seed)
    tests = host.read_all(data["test"], settings["test_rows"], seed)
    bench = Bench(host, host.record(batches, CUT_ROWS), tests, ROUNDS)
    facts = {"model": model.name, **settings, **origin(HERE.parents[1])}
    if not results.select(model=model.name, **DENSE):
        results.add([facts | DENSE | bench.dense_facts()])
    for way in lacking(model, results):
        row = factorise(bench, way, batches, settings["steps"], seed)
        results.add([facts | row])
        print(
            model.name,
            *(f"{row[name]}" for name in KEY[1:]),
            f"score {row['score']}",
            f"{row['speed_up']} x",
            flush=True,
        )


def _columns(way: Way) -> dict[str, object]:
    return {"split": way.split, "slices": way.slices, "router": way.learning, "active": way.active}


def factorise(bench: Bench, way: Way, batches: list[object], steps: int, seed: int) -> dict[str, object]:
    """Cuts a copy of a host, trains it and measures it; the score before the training too."""
    host = bench.host.clone()
    torch.manual_seed(seed)  # routers start at random
    layers = slice_parts(bench.parts, Cut(way.split, way.slices, way.active, KINDS[way.learning], seed), bench.rows)
    for name, layer in layers.items():
        host.put(name, layer)
    before = host.quality(bench.tests)
    losses = train_slices(host, bench.parts, batches, way.learning, steps, LR, seed=seed)
    facts = {"share": way.active / way.slices, "score_untrained": round(before.score, 5)}
    return _columns(way) | facts | {"loss": round(losses[-1], 4)} | bench.measure(host, layers)


def measure_all(options: argparse.Namespace, results: ResultFile) -> None:
    """All models, that of speech only where there is one."""
    if len(options.seeds) > 1:
        raise MoleError("--seeds: give one")
    models = [MODELS[n] for n in at_hand({n: MODELS[n].kind for n in options.models}, options.speech)]
    for model in models:
        check_settings(results.path, results.select(model=model.name), settings_of(model, options))
    do_all(measure, [(model, options, results) for model in models if lacking(model, results)], options.jobs)


def main(words: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0, or 1 where something is wrong that the user can put right.
    """
    root = HERE.parents[1]
    parser = recipe_parser(__doc__ or "", HERE, "data/texts")
    add_jobs(parser)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--device", default="cpu", help="where cuts are trained and timed (%(default)s)")
    parser.add_argument("--speech", type=Path, default=root / "runs/prompts5/model", help="recogniser (%(default)s)")
    parser.add_argument("--speech-data", type=Path, default=root / "data/prompts5", help="its corpus (%(default)s)")
    parser.add_argument(
        "--rows", type=positive_number, help="tokens or frames to train on and to test on; default: as plan.py says"
    )
    parser.add_argument(
        "--tuning-steps", type=positive_number, help="of the slices' short training; default: as plan.py says"
    )
    options = parser.parse_args(words)
    from pictures import draw
    from tables import write_tables

    return run_recipe(options, KEY, measure_all, draw, write_tables)


if __name__ == "__main__":
    sys.exit(main())
