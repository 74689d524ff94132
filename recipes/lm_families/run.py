"""Trains, measures and tabulates experts of languages: `python recipes/lm_families/run.py`; see README.md.

For each (condition, seed): a dense model first, then each system that results.json lacks goes on from it. Give the same
command again after an interruption, or a day later: what is done stays done.
"""

import argparse
import sys
from collections.abc import Sequence
from statistics import mean
from typing import Any

from plan import CONDITIONS, HERE, START, SYSTEMS, Condition, System, read

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
from mole_asr.text.evaluate import Evaluation, evaluate
from mole_asr.text.report import quality, training
from mole_asr.text.upcycle import upcycle

FEW = 2  # windows of each language, to see that a model starts as the dense one
_SPLITS = {"train": "train", "valid": "dev"}


def fit_words(condition: Condition, seed: int, stage: str, options: argparse.Namespace) -> list[str]:
    """Words for `mole-asr fit` that all systems of a stage share."""
    words = [f"--config={HERE / name}.yaml" for name in ("base", f"conditions/{condition.name}", stage)]
    words += [f"--data.{key}_texts={options.data / f'texts_{split}.jsonl'}" for key, split in _SPLITS.items()]
    # Another order of the texts than the dense model had.
    words.append(f"--data.seed={seed if stage == START else 1000 + seed}")
    return words + ([] if options.steps is None else step_words(options.steps, read("base")["trainer"]))


def name_of(system: System | None) -> str:
    """In results.json."""
    return START if system is None else system.name


def stage_of(system: System | None) -> str:
    """Name of the config that says how long it is trained."""
    return START if system is None else "continued"


def steps_of(system: System | None, options: argparse.Namespace) -> int:
    """Steps of its training."""
    return options.steps or read(stage_of(system))["trainer"]["max_steps"]


def measure(
    condition: Condition, system: System | None, seed: int, options: argparse.Namespace, results: ResultFile
) -> None:
    """Trains and evaluates one system, or the dense model that all start from."""
    name, stage = name_of(system), stage_of(system)
    key = {"condition": condition.name, "system": name, "seed": seed}
    print(f"\n== {condition.title}, {name}, seed {seed}", flush=True)
    folder = options.runs / condition.name / name / f"seed{seed}"
    start = options.runs / condition.name / START / f"seed{seed}" / "model"
    words = fit_words(condition, seed, stage, options)
    if system is not None:
        words += [f"--config={HERE / system.file}.yaml", *system.words(condition), f"--model.init_from={start}"]
    train(folder, words)
    chosen = read_test_texts(options.data, condition.languages)
    model = load_text_model(folder / "model")
    found = evaluate(model, chosen, condition.windows)
    data = read("base")["data"]
    row: dict[str, Any] = {**key, "steps": steps_of(system, options), **quality(model, found)}
    row |= training(folder, model, found, data["window"] * data["batch_windows"])
    row |= {"own_expert": own_expert(model, found)}
    if system is not None:
        row["start_shift"] = start_shift(load_text_model(start), system, condition, chosen)
    results.add([row | origin(HERE.parents[1])])
    print(f"bits a byte: {row['bits_per_byte']:.4f}", flush=True)


def own_expert(model: LanguageModel, found: Evaluation) -> list[float] | None:
    """Share of the tokens, each layer, that have the expert of their own language or branch among theirs, untold."""
    experts = model.model.experts[0]
    if experts.policy != "forced":
        return None
    numbers = dict(zip(model.model.languages, experts.experts_of(model.model.languages), strict=True))
    return [
        round(mean(experts.top_k * float(load_E[numbers[code]]) for code, load_E in loads.items()), 4)
        for loads in found.loads.values()
    ]


def start_shift(dense: LanguageModel, system: System, condition: Condition, texts: dict[str, Sequence[str]]) -> float:
    """The largest change in bits a byte, over languages, that turning the dense model into experts makes by itself."""
    before = evaluate(dense, texts, FEW).bits
    model = upcycle(dense.model, [system.experts(condition)], condition.languages).eval()
    after = evaluate(LanguageModel(model, dense.vocabulary, dense.window, dense.major_languages), texts, FEW).bits
    return round(max((after[code] - before[code] for code in before), key=abs), 6)


def measure_all(options: argparse.Namespace, results: ResultFile) -> None:
    """What results.json lacks."""
    calls = [
        (CONDITIONS[condition], system, seed, options, results)
        for seed in options.seeds
        for condition in options.conditions
        for system in (None, *(SYSTEMS[name] for name in options.systems))
        if results.lacks(steps_of(system, options), condition=condition, system=name_of(system), seed=seed)
    ]
    if calls:
        need_texts(options.data, options.source)
    do_all(measure, [call for call in calls if call[1] is None], options.jobs)
    do_all(measure, [call for call in calls if call[1] is not None], options.jobs)  # they go on from those


def main(words: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0, or 1 where something is wrong that the user can put right.
    """
    parser = recipe_parser(__doc__ or "", HERE, "data/texts")
    add_jobs(parser)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS), metavar="NAME")
    options = parser.parse_args(words)
    from pictures import draw
    from tables import write_tables

    return run_recipe(options, ("condition", "system", "seed"), measure_all, draw, write_tables)


if __name__ == "__main__":
    sys.exit(main())
