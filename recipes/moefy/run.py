"""Cuts trained models into slices and measures what they keep and how fast they are; see README.md.

`python recipes/moefy/run.py` trains the language models that are missing, adapts to ReLU, and measures each
(model, split, slices) that results.json lacks. Give the same command again after an interruption: what is done stays
done.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from plan import (
    ADAPTATION,
    CALIBRATION_ROWS,
    CONFIG,
    HERE,
    MODELS,
    ROUNDS,
    ROUTERS,
    SHARES,
    TEST_ROWS,
    TUNED,
    TUNED_SHARE,
    TUNING,
    Model,
)

from mole_asr.convert.host import Host, open_host
from mole_asr.convert.slicing import Cut, active_slices
from mole_asr.convert.sweep import Bench, at_hand, check_settings, sweep_cuts, tuned_cut
from mole_asr.convert.training import relu_adaptation
from mole_asr.errors import MoleError
from mole_asr.moe.convert.splits import Split
from mole_asr.score.jobs import do_all
from mole_asr.score.results import ResultFile
from mole_asr.score.runs import add_jobs, need_texts, origin, positive_number, recipe_parser, run_recipe, train

KEY = ("model", "split", "slices", "router", "active", "tuned")
DENSE = {"split": "dense", "slices": 1, "router": "dense", "active": 1, "tuned": 0}


def data_of(model: Model, split: str, options: argparse.Namespace) -> str:
    """The file of a model's data."""
    name = f"texts_{split}.jsonl" if model.kind == "text" else f"cuts_{split}.jsonl"
    return str((options.data if model.kind == "text" else options.speech_data) / name)


def settings_of(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """What decides about the rows of a model, beside their keys."""
    adaptation, training_rows = options.training or ADAPTATION[model.kind]
    settings = {
        "device": options.device,
        "seed": options.seeds[0],
        "cut_rows": options.rows or CALIBRATION_ROWS,
        "test_rows": options.rows or TEST_ROWS[model.kind],
        "training_rows": training_rows,
    }
    if model.kind == "text":
        config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        settings["model_steps"] = options.steps or config["trainer"]["max_steps"]
    return settings | ({"adaptation_steps": adaptation} if model.adapted else {})


def check_rows(model: Model, options: argparse.Namespace, results: ResultFile) -> None:
    """Refuses to measure a model beside rows of other settings: its own, or those of what it is compared with.

    Raises:
        MoleError: there are such rows.
    """
    for each in {model.name: model, model.of: MODELS[model.of]}.values():
        check_settings(results.path, results.select(model=each.name), settings_of(each, options))


def folder_of(model: Model, options: argparse.Namespace) -> Path:
    """The folder of a dense model; language models are trained where they are missing."""
    if model.kind == "speech":
        return options.speech
    steps = settings_of(model, options)["model_steps"]
    words = [f"--config={CONFIG}", *model.words, f"--trainer.max_steps={steps}", f"--data.seed={options.seeds[0]}"]
    splits = {"train": "train", "valid": "dev"}
    words += [f"--data.{key}_texts={data_of(model, split, options)}" for key, split in splits.items()]
    train(options.runs / model.name, words)
    return options.runs / model.name / "model"


def training_data(model: Model, host: Host, options: argparse.Namespace) -> list[Any]:
    """Batches to adapt and to tune by."""
    rows = settings_of(model, options)["training_rows"]
    return host.read_all(data_of(model, "train", options), rows, options.seeds[0] + 1)


def host_of(model: Model, options: argparse.Namespace) -> Host:
    """The dense model, adapted where it is to be."""
    host = open_host(folder_of(MODELS[model.of], options), options.device)
    if model.adapted:
        steps = settings_of(model, options)["adaptation_steps"]
        print(f"{model.name}: {steps} steps of adaptation to ReLU", flush=True)
        losses = relu_adaptation(host, training_data(model, host, options), steps, seed=options.seeds[0])
        print(f"distillation loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)
    return host


def tuning_steps(model: Model, options: argparse.Namespace) -> int:
    """Steps of the training of a cut."""
    return options.training[0] if options.training else TUNING[model.kind]


def lacking(
    model: Model, options: argparse.Namespace, results: ResultFile
) -> tuple[list[tuple[Split, int]], list[tuple[Split, int]]]:
    """Splits and numbers of slices that results.json lacks as they are cut, and tuned."""
    steps = tuning_steps(model, options)
    plain = [cut for cut in model.cuts if not _has(results, model, *cut, tuned=0)]
    return plain, [cut for cut in model.cuts if cut[0] in TUNED and not _has(results, model, *cut, tuned=steps)]


def measure(model: Model, options: argparse.Namespace, results: ResultFile) -> None:
    """All cuts of a model that results.json lacks."""
    plain, tuned = lacking(model, options, results)
    steps = tuning_steps(model, options)
    host, seed, settings = host_of(model, options), options.seeds[0], settings_of(model, options)
    rows = host.record(host.read_all(data_of(model, "train", options), settings["cut_rows"], seed))
    tests = host.read_all(data_of(model, "test", options), settings["test_rows"], seed)
    bench = Bench(host, rows, tests, ROUNDS)
    facts = {"model": model.name, **settings, **origin(HERE.parents[1])}
    if not _has(results, model, "dense", 1, tuned=0):
        results.add([facts | DENSE | bench.dense_facts() | {"silent_share": round(bench.silent_share(), 4)}])
    for split, slices in plain:
        actives = sorted({active_slices(share, slices) for share in SHARES})
        _note(results, [facts | row for row in sweep_cuts(bench, split, slices, actives, ROUTERS, seed)])
    teacher = open_host(folder_of(MODELS[model.of], options), options.device)
    for split, slices in tuned:
        cut = Cut(split, slices, active_slices(TUNED_SHARE, slices), "mlp", seed)
        _note(results, [facts | tuned_cut(bench, cut, teacher, training_data(model, host, options), steps)])


def _has(results: ResultFile, model: Model, split: str, slices: int, tuned: int) -> bool:
    return bool(results.select(model=model.name, split=split, slices=slices, tuned=tuned))


def _note(results: ResultFile, rows: list[dict[str, Any]]) -> None:
    results.add(rows)
    for row in rows:
        print(*(f"{row[name]}" for name in KEY), f"score {row['score']}", f"{row['speed_up']} x", flush=True)


def measure_all(options: argparse.Namespace, results: ResultFile) -> None:
    """All models, those of speech only where there is one."""
    if len(options.seeds) > 1:
        raise MoleError("--seeds: give one")
    models = [MODELS[n] for n in at_hand({n: MODELS[n].kind for n in options.models}, options.speech)]
    for model in models:
        check_rows(model, options, results)
    models = [model for model in models if any(lacking(model, options, results))]
    trained = dict.fromkeys(model.of for model in models if model.kind == "text")
    if trained:
        need_texts(options.data, options.source)
    # Two models may be cuts of one, which is trained before.
    do_all(folder_of, [(MODELS[name], options) for name in trained], options.jobs)
    longest_first = sorted(models, key=lambda model: (model.kind != "speech", not model.adapted))
    do_all(measure, [(model, options, results) for model in longest_first], options.jobs)


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
        "--rows", type=positive_number, help="tokens or frames to cut by and to test on; default: as plan.py says"
    )
    parser.add_argument(
        "--training", type=positive_number, nargs=2, metavar=("STEPS", "ROWS"), help="short ones, else as plan.py"
    )
    options = parser.parse_args(words)
    from pictures import draw
    from tables import write_tables

    return run_recipe(options, KEY, measure_all, draw, write_tables)


if __name__ == "__main__":
    sys.exit(main())
