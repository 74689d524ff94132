"""Trains, scores and tabulates MoLE and its rivals: `python recipes/mole_vs_rivals/run.py`; see README.md.

For each (condition, seed, system) that results.json lacks: prepare, tokenizer, fit, transcribe, score. Give the same
command again after an interruption, or a day later: what is done stays done.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import yaml
from measure import Heard, figures, gather, transcribe
from plan import BASE, CONDITIONS, HERE, SYSTEMS, Condition, System, TestSet
from results import Results
from training import gradient_norms

from mole_asr.corpus.manifest import Manifest, write_manifest
from mole_asr.corpus.subset import hours_of, thin
from mole_asr.corpus.text_tokenizer import train_tokenizer
from mole_asr.errors import MoleError
from mole_asr.score.jobs import do_all
from mole_asr.score.results import Row
from mole_asr.score.runs import add_jobs, origin, train

ROOT = HERE.parents[1]
DEGRADED = {"noisy": "noise", "telephone": "telephone"}  # copies of the test set


@dataclass(frozen=True)
class Setting:
    """One (system, condition, seed) and where it lies.

    Attributes:
        system: how the model is made.
        condition: what it learns from.
        seed: of the training.
        data: folder of the corpora.
        runs: folder of the runs.
        epochs: of the training; None: as the configs say.
    """

    system: System
    condition: Condition
    seed: int
    data: Path
    runs: Path
    epochs: int | None

    @property
    def train_manifest(self) -> Path:
        """What is trained on: the corpus, or what the condition makes of it."""
        if self.condition.shares or self.condition.synthetic:
            return self.runs / self.condition.name / "cuts_train.jsonl"
        return self.data / self.condition.corpus / "cuts_train.jsonl"

    def manifest(self, test: TestSet) -> Path:
        """What a test set consists of."""
        return self.runs / "tests" / f"{self.condition.corpus}-{test.name}.jsonl"

    @property
    def folder(self) -> Path:
        """Where the trained model lies."""
        name = self.system.weights_of or self.system.name
        return self.runs / self.condition.name / name / f"seed{self.seed}"

    def fit_arguments(self, languages: list[str]) -> list[str]:
        """Words for `mole-asr fit`; its output folder and its languages are still to be said."""
        corpus = self.data / self.condition.corpus
        words = [f"--config={path}" for path in (BASE, self.condition.config_path, self.system.config_path)]
        words += [f"--data.train_manifest={self.train_manifest}", f"--data.valid_manifest={corpus / 'cuts_dev.jsonl'}"]
        words += [f"--data.tokenizer={corpus / 'tokenizer'}", f"--data.seed={self.seed}"]
        if self.epochs is not None:
            words.append(f"--trainer.max_epochs={self.epochs}")
        if self.system.as_large_as is not None:
            expert = _read(SYSTEMS[self.system.as_large_as].config_path)["model"]["encoder"]["expert_d_ff"]
            # One expert a language, and the agnostic one.
            words.append(f"--model.encoder.expert_d_ff={expert * (len(languages) + 1)}")
        return words

    def configured_epochs(self) -> int:
        """Epochs of the training."""
        if self.epochs is not None:
            return self.epochs
        layers = [_read(path).get("trainer", {}) for path in (BASE, self.condition.config_path)]
        return (layers[0] | layers[1])["max_epochs"]


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def prepare(setting: Setting, source: str | None) -> None:
    """Corpus, degraded test sets, tokenizer and training manifest of a condition, where they are missing."""
    name = setting.condition.corpus
    corpus = setting.data / name
    if not (corpus / "cuts_train.jsonl").exists():
        from mole_asr.data_prep import prompts, voices13

        {"prompts5": prompts.prepare, "voices13": voices13.prepare}[name](corpus, source=source)
    for name, kind in DEGRADED.items():
        if not (corpus / f"cuts_test_{name}.jsonl").exists():
            from mole_asr.data_prep import degraded

            degraded.prepare(corpus / "cuts_test.jsonl", corpus / f"cuts_test_{name}.jsonl", kind)
    if not (corpus / "tokenizer" / "tokenizer.model").exists():
        train_tokenizer(corpus / "cuts_train.jsonl", corpus / "tokenizer", model_type="char", byte_fallback=False)
    if not setting.train_manifest.exists():
        _make_train_manifest(setting, corpus)


def _make_train_manifest(setting: Setting, corpus: Path) -> None:
    """Writes the condition's shares of the corpus, and synthetic voices."""
    real, voices = setting.train_manifest.with_name("cuts_real.jsonl"), setting.condition.synthetic
    if voices is not None and not (setting.data / voices).exists():
        verb = f"mole-asr prepare synthetic {corpus / 'cuts_train.jsonl'} {(setting.data / voices).parent}"
        raise MoleError(f"{setting.data / voices}: no such manifest; make it with `{verb}`")
    thin(corpus / "cuts_train.jsonl", real, setting.condition.shares)
    tables = [Manifest(real), *([Manifest(setting.data / voices)] if voices is not None else [])]
    write_manifest(chain.from_iterable(tables), setting.train_manifest)


def lacking(setting: Setting, results: Results) -> list[TestSet]:
    """The test sets that results.json lacks of one setting."""
    _check_epochs(setting, results)
    key = {"system": setting.system.name, "condition": setting.condition.name, "seed": setting.seed}
    return [test for test in setting.condition.tests if not results.select(**key, test_set=test.name)]


def run_all(settings: list[Setting], results: Results, source: str | None, jobs: int) -> None:
    """Measures what results.json lacks."""
    calls = []
    for setting in settings:
        if tests := lacking(setting, results):
            prepare(setting, source)
            # Here, as jobs share these files.
            ready = [test for test in tests if gather(test, setting.data, setting.manifest(test))]
            for test in (test for test in tests if test not in ready):
                print(f"{setting.condition.name}: {test.name} passed over, as it needs {' and '.join(test.manifests)}")
            if ready:
                calls.append((setting, ready, results))
    do_all(run, [call for call in calls if call[0].system.weights_of is None], jobs)
    do_all(run, [call for call in calls if call[0].system.weights_of is not None], jobs)


def run(setting: Setting, ready: list[TestSet], results: Results) -> None:
    """Measures one setting on these test sets; trains for it if the model is not there."""
    system, condition = setting.system, setting.condition
    print(f"\n== {condition.name}, {system.name}, seed {setting.seed}: {', '.join(t.name for t in ready)}", flush=True)
    hours = hours_of(setting.train_manifest)
    languages = list(hours)
    hours["all"] = sum(hours.values())
    words = setting.fit_arguments(languages)
    parts = {code: [code] for code in languages} if system.monolingual else {"": languages}
    seconds = sum(
        train(setting.folder / part, words, [f"--data.languages={json.dumps(codes)}"]) for part, codes in parts.items()
    )
    models = {code: setting.folder / part / "model" for part, codes in parts.items() for code in codes}
    for test in ready:
        hypothesis = setting.runs / condition.name / system.name / f"seed{setting.seed}" / f"{test.name}.jsonl"
        heard = transcribe(models, setting.manifest(test), hypothesis, system.told)
        rows, utterances, details = figures(setting.manifest(test), hypothesis, heard)
        if test.name != "test":
            del details["serves"]
        elif not system.monolingual:
            details["gradients"] = gradient_norms(setting.folder)
        facts = _facts(setting, test.name, heard, seconds, len(parts))
        rows = [facts | row | {"train_hours": round(hours.get(row["language"], 0.0), 4)} for row in rows]
        results.add_run(rows, f"{condition.corpus}-{test.name}", utterances, details)
        total = rows[-1]
        print(f"{test.name}: WER {total['wer']:.1f} %, CER {total['cer']:.1f} %", flush=True)


def _check_epochs(setting: Setting, results: Results) -> None:
    """Refuses to mix trainings of different lengths: what stands in one table made the same number of steps."""
    epochs, rows = setting.configured_epochs(), results.select(condition=setting.condition.name)
    if others := sorted({row["epochs"] for row in rows} - {epochs}):
        raise MoleError(
            f"{results.path}: its rows of {setting.condition.name} come from {others[0]} epochs, not {epochs}: "
            f"give --epochs {others[0]}, or another --results and --runs"
        )


def _facts(setting: Setting, test_set: str, heard: Heard, train_seconds: float, models: int) -> Row:
    """What all rows of a test set say."""
    return {
        "system": setting.system.name,
        "condition": setting.condition.name,
        "seed": setting.seed,
        "test_set": test_set,
        "active_parameters": heard.parameters.active,
        "total_parameters": heard.parameters.total * models,
        "train_seconds": round(train_seconds, 1),
        "real_time_factor": round(heard.seconds / max(heard.audio_s, 1e-9), 5),
        "epochs": setting.configured_epochs(),
        **origin(ROOT),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--conditions", nargs="+", default=["prompts5-full"], choices=list(CONDITIONS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    add_jobs(parser)
    parser.add_argument("--epochs", type=int, help="of each training; default: as the configs say")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the corpora (%(default)s)")
    parser.add_argument("--source", help="folder with the Debian packages, where apt cannot fetch them")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / HERE.name, help="folder of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results.json (%(default)s)")
    parser.add_argument("--table", action="store_true", help="train nothing: only write the tables into README.md")
    parser.add_argument("--pictures", action="store_true", help="train nothing: only draw the pictures")
    return parser


def main(words: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0, or 1 where something is wrong that the user can put right.
    """
    options = _parser().parse_args(words)
    try:
        results = Results(options.results)
        if not (options.table or options.pictures):
            places = (options.data.absolute(), options.runs.absolute(), options.epochs)
            chosen = product(options.conditions, options.seeds, options.systems)
            settings = [Setting(SYSTEMS[system], CONDITIONS[name], seed, *places) for name, seed, system in chosen]
            run_all(settings, results, options.source, options.jobs)
            results.read()
        if options.pictures:
            from pictures import draw

            draw(results, options.results)
        if options.table or not options.pictures:
            from tables import write_tables

            print(write_tables(results, options.results / "README.md"))
    except MoleError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
