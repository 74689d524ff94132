"""What the commands of recipes share: their options, and trainings that can be interrupted."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mole_asr.corpus.manifest import Manifest, write_manifest
from mole_asr.corpus.texts import read_texts
from mole_asr.errors import MoleError
from mole_asr.files import write_text
from mole_asr.score.jobs import is_job
from mole_asr.score.results import ResultFile, read_json_or

if TYPE_CHECKING:
    from mole_asr.transcribe.command import TranscribeResult

# Keys that say where something lies, at the end of their names: a folder may move.
_PLACES = ("manifest", "tokenizer", "_texts", "init_from")


def train(folder: Path, words: Sequence[str], extra: Sequence[str] = ()) -> float:
    """Trains a model into `folder`/model, or goes on, or does nothing where it is done.

    Args:
        folder: of the run.
        words: for `mole-asr fit`, but the folder.
        extra: more of them, which are no part of the configuration that a later call is compared with.

    Returns:
        Seconds of the training, those of interrupted attempts included.

    Raises:
        MoleError: the folder holds a run of another configuration, or its training.json is damaged; or a recording
            could not be read.
    """
    from mole_asr.fit import fit

    notes, settings = folder / "training.json", settings_of(words)
    state = read_json_or(notes, {"seconds": 0.0, "done": False})
    if state.setdefault("settings", settings) != settings:
        raise MoleError(f"{folder} was trained with another configuration: remove it, or give another --runs")
    if state["done"] and (folder / "model" / "model.safetensors").exists():
        return state["seconds"]
    if state["done"]:  # somebody removed the model
        state |= {"seconds": 0.0, "done": False}
    start, before = time.monotonic(), state["seconds"]
    _note(notes, state)  # before all, as a process may be killed
    try:
        bar = ["--trainer.enable_progress_bar=false"] if is_job() else []
        failures = fit([*words, f"--output={folder}", *extra, *bar]).failures
        if failures:  # a measurement of less than it says
            first = f"{failures[0]} (of {len(failures)})"
            raise MoleError(f"{folder}: trained without recordings: {first}; mend them and remove the folder")
        state["done"] = True
    finally:
        state["seconds"] = before + time.monotonic() - start
        _note(notes, state)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return state["seconds"]


def _note(path: Path, state: dict[str, Any]) -> None:
    write_text(path, json.dumps(state, indent=1) + "\n")


def settings_of(words: Sequence[str]) -> list[str]:
    """What decides about the outcome: the keys given, and the lines of the configs without comments.

    Args:
        words: for `mole-asr fit`; those that say where data lie are left out.
    """
    settings = []
    for word in words:
        name, _, value = word.partition("=")
        if name == "--config":
            lines = Path(value).read_text(encoding="utf-8").splitlines()
            settings += [line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        elif not name.endswith(_PLACES):
            settings.append(word)
    return settings


def code_version(root: Path) -> str:
    """The commit of the code that measures; with a + where files differ from it.

    Args:
        root: folder of the repository.
    """
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin(root: Path) -> dict[str, str]:
    """What a row of results says of where it comes from: the commit of the code, see `code_version`, and the day."""
    return {"commit": code_version(root), "date": date.today().isoformat()}


def need_texts(folder: Path, source: str | None) -> None:
    """Prepares texts in many languages, where they are missing.

    Args:
        folder: of the texts.
        source: folder with their packages, where they are fetched already.
    """
    if not all((folder / f"texts_{split}.jsonl").exists() for split in ("train", "dev", "test")):
        from mole_asr.data_prep.texts import prepare

        prepare(folder, source=source)


def read_test_texts(folder: Path, languages: Sequence[str]) -> dict[str, Sequence[str]]:
    """The test split in the languages of a model, in their order.

    Args:
        folder: of the texts.
        languages: codes.

    Raises:
        MoleError: the split cannot be read, or lacks a language.
    """
    path = folder / "texts_test.jsonl"
    texts = read_texts(path)
    if missing := [code for code in languages if code not in texts]:
        raise MoleError(f"{path}: has no text in {', '.join(missing)}; give a --data that has")
    return {code: texts[code] for code in languages}


def step_words(steps: int, trainer: Mapping[str, Any]) -> list[str]:
    """Words for `mole-asr fit` to make another number of steps; a short training is validated and logged too.

    Args:
        steps: to make.
        trainer: what the configs say of it.
    """
    often = {key: min(steps, trainer[key]) for key in ("val_check_interval", "log_every_n_steps")}
    return [f"--trainer.{key}={value}" for key, value in {"max_steps": steps, **often}.items()]


def transcribe_told(manifest: Path, output: Path, **options: Any) -> "TranscribeResult":
    """Transcribes a manifest `x.jsonl` into `output/x.jsonl`, each utterance with its language given.

    Args:
        manifest: to transcribe, one language after another.
        output: folder; what each language gave lies in folders of it.
        options: for `transcribe`.

    Raises:
        MoleError: an utterance names no language.
    """
    from mole_asr.transcribe.command import TranscribeResult, transcribe

    table, result, lines = Manifest(manifest), TranscribeResult(), []
    if (unnamed := np.flatnonzero(table.language_ids < 0)).size:
        raise MoleError(f"{manifest}: utterance {table[int(unnamed[0])].id} names no language to tell; add it")
    for number, code in enumerate(table.languages):
        part = output / code / manifest.name
        write_manifest((table[int(row)] for row in np.flatnonzero(table.language_ids == number)), part)
        result.add(transcribe([str(part)], output=str(output / code / "heard"), language=code, **options))
        lines.append((output / code / "heard" / manifest.name).read_text("utf-8"))
    write_text(output / manifest.name, "".join(lines))
    return result


def recipe_parser(description: str, here: Path, data: str) -> argparse.ArgumentParser:
    """The options that every recipe has.

    Args:
        description: of the command.
        here: folder of the recipe.
        data: folder of its corpus, seen from that of the repository.
    """
    root, style = here.parents[1], argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    parser.add_argument("--seeds", nargs="+", type=_whole_number, default=[0])
    parser.add_argument("--steps", type=positive_number, help="of each training; default: as the configs say")
    parser.add_argument("--data", type=Path, default=root / data, help="folder of the corpus (%(default)s)")
    parser.add_argument("--source", help="folder with the packages of the corpus, where they are fetched already")
    parser.add_argument("--runs", type=Path, default=root / "runs" / here.name, help="folder of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=here, help="folder of results.json (%(default)s)")
    parser.add_argument("--table", action="store_true", help="train nothing: only write the tables into README.md")
    parser.add_argument("--pictures", action="store_true", help="train nothing: only draw the pictures")
    return parser


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Adds the option of a recipe that works with `do_all`."""
    parser.add_argument("--jobs", type=positive_number, default=1, help="processes side by side, which share the cores")


def _whole_number(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number from 0 on")
    return int(word)


def positive_number(word: str) -> int:
    """The type of an option that is a number from 1 on."""
    if not _whole_number(word):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(word)


def run_recipe(
    options: argparse.Namespace,
    key: Sequence[str],
    measure: Callable[[argparse.Namespace, ResultFile], None],
    draw: Callable[[ResultFile, Path], None],
    tables: Callable[[ResultFile, Path], str],
) -> int:
    """Does what the options of `recipe_parser` say: measures what is missing, draws, and prints the tables.

    Args:
        options: of the command line.
        key: columns of results.json that say what was measured.
        measure: trains and measures what is missing.
        draw: draws the pictures into a folder.
        tables: writes the tables into a README; returns them.

    Returns:
        0, or 1 where something is wrong that the user can put right.
    """
    try:
        results = ResultFile(options.results / "results.json", key)
        if not (options.table or options.pictures):
            measure(options, results)
            results.read()
        if options.pictures or not options.table:
            draw(results, options.results)
        if options.table or not options.pictures:
            print(tables(results, options.results / "README.md"))
    except MoleError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0
