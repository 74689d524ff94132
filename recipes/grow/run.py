"""Holds one language out, trains a recogniser on the others, adds the language afterwards; see README.md.

`python recipes/grow/run.py` trains what is missing and measures each (stage, told) that results.json lacks. Give the
same command again after an interruption: what is done stays done.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from mole_asr.asr.checkpoint import load_model
from mole_asr.asr.extend import extend
from mole_asr.asr.parameters import count_parameters
from mole_asr.asr.prune import prune
from mole_asr.corpus.families import family_of
from mole_asr.corpus.manifest import Manifest, write_manifest
from mole_asr.corpus.subset import hours_of, thin
from mole_asr.corpus.text_tokenizer import extend_tokenizer, train_tokenizer
from mole_asr.data_prep import voices13
from mole_asr.data_prep.prompts import UNACCENTED
from mole_asr.errors import MoleError
from mole_asr.score.figures import language_rows
from mole_asr.score.results import ResultFile, Row
from mole_asr.score.runs import origin, recipe_parser, run_recipe, train, transcribe_told
from mole_asr.score.score import score
from mole_asr.transcribe.command import transcribe

HERE = Path(__file__).parent
KEY = ("new", "seed", "stage", "told")
IDENTIFICATION = ("language_id_accuracy", "ece", "reliability_right", "reliability_wrong")
NEW_PIECES = 20
"""Of several letters, at most; letters that the others lack come first."""
SHARES = {"en": 0.3, "cs": 0.5, "ru": 0.5}
"""Of the hours of the languages with most speech, so that the first training takes half an hour."""


@dataclass(frozen=True)
class Growth:
    """One language that is held out, and where all lies.

    Attributes:
        new: its code.
        seed: of the trainings.
        data: folder of the corpus.
        folder: of the runs.
        words: more for `mole-asr fit`.
    """

    new: str
    seed: int
    data: Path
    folder: Path
    words: tuple[str, ...]

    def manifest(self, split: str, new: bool) -> Path:
        """The utterances of a split that are of the new language, or of all others; written where they are missing."""
        path = self.folder / f"{split}_{'new' if new else 'old'}.jsonl"
        if not path.exists():
            table = Manifest(self.data / f"cuts_{split}.jsonl")
            if self.new not in table.languages:
                raise MoleError(f"--new {self.new}: {self.data} has {', '.join(table.languages)}")
            shares = {code: share for code, share in SHARES.items() if code in table.languages and code != self.new}
            thinned = split == "train" and not new
            whole = self.folder / "train_whole.jsonl" if thinned else path
            write_manifest((u for u in table if (u.language == self.new) == new), whole)
            if thinned:
                thin(whole, path, shares)
        return path

    @property
    def relative(self) -> str | None:
        """The language of the same family with most speech among the others; None where there is none."""
        hours = hours_of(self.manifest("train", new=False))
        kin = [code for code in hours if family_of(code) == family_of(self.new)]
        return max(kin, key=hours.__getitem__, default=None)

    def fit(self, name: str, manifest: Path, tokenizer: Path, *words: str) -> Path:
        """Trains on a manifest; the folder of the model. It is validated on the languages that are new, or old."""
        data = {
            "train_manifest": manifest,
            "valid_manifest": self.manifest("dev", new=name != "before"),
            "tokenizer": tokenizer,
            "seed": self.seed,
        }
        options = [f"--data.{key}={value}" for key, value in data.items()]
        train(self.folder / name, [f"--config={HERE / 'base.yaml'}", *words, *options, *self.words])
        return self.folder / name / "model"


def before(growth: Growth) -> Path:
    """The recogniser of the other languages."""
    tokenizer, old = growth.folder / "tokenizer", growth.manifest("train", new=False)
    if not tokenizer.exists():
        train_tokenizer(old, tokenizer, model_type="char", byte_fallback=False)
    return growth.fit("before", old, tokenizer, f"--config={HERE / 'recogniser.yaml'}")


def extended(growth: Growth, family: str | None = None) -> Path:
    """The same with room for the new language: an expert of its own, or the one of its relative."""
    wider = growth.folder / ("extended" + (f"_{family}" if family else ""))
    tokenizer = growth.folder / "wider_tokenizer"
    old = before(growth)
    if not tokenizer.exists():
        texts = growth.manifest("train", new=True)
        extend_tokenizer(growth.folder / "tokenizer", texts, tokenizer, extra_pieces=NEW_PIECES)
    if not (wider / "model.safetensors").exists():
        extend(str(old), str(wider), languages=[growth.new], tokenizer=str(tokenizer), family=family)
    return wider


def grown(growth: Growth, family: str | None = None, replay: bool = True) -> Path:
    """After the training of what is new, on the new language alone."""
    wider = extended(growth, family)
    languages = ",".join(load_model(wider)[0].languages)
    words = [f"--model.init_from={wider}", "--model.freeze_old=true", f"--data.languages=[{languages}]"]
    name = "grown" + (f"_{family}" if family else "")
    if not replay:
        name, words = f"{name}_unreplayed", [*words, "--model.loss_weights.replay=0"]
    return growth.fit(name, growth.manifest("train", new=True), growth.folder / "wider_tokenizer", *words)


def unreplayed(growth: Growth) -> Path:
    """As `grown`, without the examples of old languages that the model keeps."""
    return grown(growth, replay=False)


def shared(growth: Growth) -> Path | None:
    """As `grown`, but the new language has no expert of its own: it shares that of its relative."""
    return None if growth.relative is None else grown(growth, growth.relative)


def pruned(growth: Growth) -> Path:
    """The grown model without the new language."""
    folder = growth.folder / "pruned"
    if not (folder / "model.safetensors").exists():
        whole = grown(growth)
        languages = [code for code in load_model(whole)[0].languages if code != growth.new]
        prune(str(whole), str(folder), languages=languages)
    return folder


STAGES: dict[str, Callable[[Growth], Path | None]] = {
    "before": before,
    "extended": extended,
    "grown": grown,
    "unreplayed": unreplayed,
    "shared": shared,
    "pruned": pruned,
}
KNOWS_NEW = ("grown", "unreplayed", "shared")


def hear(growth: Growth, stage: str, told: bool, model: Path) -> tuple[Path, Path]:
    """Transcribes the test split greedily, without n-grams.

    Returns:
        What was transcribed, who is told the language only what the model has one for; the transcripts.
    """
    parts = (False,) if told and stage not in KNOWS_NEW else (False, True)
    test = growth.folder / ("test_old.jsonl" if len(parts) == 1 else "test.jsonl")
    if not test.exists():
        tables = [Manifest(growth.manifest("test", new)) for new in parts]
        write_manifest(chain.from_iterable(tables), test)
    output = growth.folder / "heard" / f"{stage}-{'told' if told else 'untold'}"
    if not (output / test.name).exists():
        if told:
            transcribe_told(test, output, model=str(model), beam=0)
        else:
            transcribe([str(test)], output=str(output), model=str(model), beam=0)
    return test, output / test.name


def measure(growth: Growth, stage: str, told: bool, results: ResultFile) -> None:
    """Makes a model, where it is missing, and scores it."""
    model = STAGES[stage](growth)
    if model is None:
        return
    test, heard = hear(growth, stage, told, model)
    rows = language_rows(score(test, heard, fold_accents=UNACCENTED))
    # Who was told the language has identified none.
    untold: Row = dict.fromkeys(IDENTIFICATION) if told else {}
    counts = compare(hear(growth, "before", told, before(growth))[1], heard, growth)
    facts = {"new": growth.new, "seed": growth.seed, "stage": stage, "told": told, "shares": None}
    facts |= {"shares": growth.relative} if stage == "shared" else {}
    facts |= {"total_parameters": count_parameters(load_model(model)[0]).total}
    facts |= origin(HERE.parents[1])
    results.add([facts | row | untold | counts.get(row["language"], {}) for row in rows])
    print(f"{growth.new}, {stage}, {'told' if told else 'untold'}: CER {rows[-1]['cer']:.1f} %", flush=True)


def compare(old: Path, new: Path, growth: Growth) -> dict[str, Row]:
    """How the transcripts of two models differ in the old languages.

    Returns:
        Language -> `utterances`; `changed`: those with another text, confidence, time of a word or reliability;
        `heard_as_new`: those that the new model heard in the new language.
    """
    counts = dict[str, Row]()
    lines = [
        {line["id"]: line for line in map(json.loads, path.read_text("utf-8").splitlines())} for path in (old, new)
    ]
    for utterance in Manifest(growth.manifest("test", new=False)):
        before, after = (found[utterance.id] for found in lines)
        row = counts.setdefault(utterance.language, dict.fromkeys(("utterances", "changed", "heard_as_new"), 0))
        row["utterances"] += 1
        row["changed"] += any(before[key] != after[key] for key in ("text", "segments", "reliability"))
        row["heard_as_new"] += after["language"] == growth.new
    return counts


def measure_all(options: argparse.Namespace, results: ResultFile) -> None:
    """What results.json lacks."""
    steps = () if options.steps is None else (f"--trainer.max_steps={options.steps}",)
    if not (options.data / "cuts_train.jsonl").exists():
        voices13.prepare(str(options.data), source=options.source)
    for seed in options.seeds:
        folder = options.runs.absolute() / options.new / f"seed{seed}"
        growth = Growth(options.new, seed, options.data.absolute(), folder, steps)
        for stage in STAGES:
            for told in (True, False):
                if not results.select(new=growth.new, seed=seed, stage=stage, told=told):
                    measure(growth, stage, told, results)


def main(words: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        0, or 1 where something is wrong that the user can put right.
    """
    parser = recipe_parser(__doc__ or "", HERE, "data/voices13")
    parser.add_argument("--new", default="nl", metavar="LANGUAGE", help="that is held out at first (%(default)s)")
    options = parser.parse_args(words)
    from tables import draw, write_tables

    return run_recipe(options, KEY, measure_all, draw, write_tables)


if __name__ == "__main__":
    sys.exit(main())
