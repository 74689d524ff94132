"""Trains MoLE on a pretrained Whisper and compares it with Whisper itself; see README.md.

`python recipes/whisper_mole/run.py --whisper FOLDER`: prepare, tokenizer, fit, transcribe, score, for each model and
test set that results.json lacks. Give the same command again after an interruption: what is done stays done.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from mole_asr.bench.whisper import whisper
from mole_asr.corpus.manifest import Manifest, write_manifest
from mole_asr.corpus.subset import hours_of
from mole_asr.corpus.text_tokenizer import train_tokenizer
from mole_asr.data_prep import voices13, words
from mole_asr.data_prep.prompts import UNACCENTED
from mole_asr.errors import MoleError
from mole_asr.files import write_text
from mole_asr.score.figures import language_rows
from mole_asr.score.results import ResultFile
from mole_asr.score.runs import origin, train, transcribe_told
from mole_asr.score.score import score
from mole_asr.transcribe.command import TranscribeResult, transcribe

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = ROOT / "conf/asr/whisper_mole.yaml"
# A head of a model of ours, and with what it is helped: word lists, that there are few languages, the language given.
HEADS = ("attention", "attention-words", "attention-words-few", "ctc", "attention-given", "attention-given-words")
# Languages of voices13 that word lists can be had of: all but Belarusian.
LISTED = ("bg", "ca", "cs", "da", "el", "en", "es", "fr", "it", "nl", "ro", "ru")
PEERS = tuple(f"whisper-{kind}-{told}" for kind in ("int8", "float32") for told in ("given", "detected"))
IDENTIFICATION = ("language_id_accuracy", "ece", "reliability_right", "reliability_wrong")


@dataclass(frozen=True)
class Part:
    """Utterances of voices13 that are transcribed together.

    Attributes:
        split: of the corpus.
        sources: starts of their ids; none: all.
        every: so manyth utterance is enough: a Whisper takes more than a second a clip.
    """

    split: str
    sources: tuple[str, ...] = ()
    every: int = 1


@dataclass(frozen=True)
class TestSet:
    """What is scored together.

    Attributes:
        parts: that it consists of.
        min_seconds: shorter utterances are left out.
    """

    parts: tuple[str, ...]
    min_seconds: float = 0.0


@dataclass(frozen=True)
class Training:
    """A model of this recipe.

    Attributes:
        sources: starts of the ids of voices13 that it is trained on; none: all.
        epochs: of the training.
        lr: of the pretrained parts; low where few voices would make it forget the others.
        tests: in languages that it knows.
        pretrained_share: of the weights of the finished model.
        words: more for `mole-asr fit`.
    """

    sources: tuple[str, ...]
    epochs: int
    lr: float
    tests: tuple[str, ...]
    pretrained_share: float = 0.0
    words: tuple[str, ...] = ()


# Where there is one voice a language, so that the model does not learn the language from the voice.
STRONGER_CHANGES = (
    "--data.augment.speed_probability=0.9",
    "--data.augment.speeds=[0.8,0.85,0.9,0.95,1.05,1.1,1.15,1.25]",
    "--data.augment.noise_probability=0.5",
    "--data.augment.telephone_probability=0.2",
    "--data.max_seconds=24",
)
PARTS = {
    "prompts5": Part("test", ("prompts-",)),
    "others": Part("test", ("queen-", "drascula-", "fillets-", "festvox-ru-", "tuxpaint-")),
    "unseen": Part("unseen", every=3),
}
SPEED = Part("test", ("prompts-",), every=4)  # in languages that all models know
TESTS = {
    "voices13": TestSet(("prompts5", "others")),
    "prompts5": TestSet(("prompts5",)),
    "unseen": TestSet(("unseen",)),
    "unseen over 2 s": TestSet(("unseen",), min_seconds=2.0),
}
TRAININGS = {
    "voices13": Training((), 2, 7e-5, tuple(TESTS)),
    "prompts5": Training(("prompts-",), 4, 3e-5, ("prompts5", "unseen", "unseen over 2 s"), 0.45, STRONGER_CHANGES),
}


@dataclass(frozen=True)
class Places:
    """Folders: of the corpus, of the runs, of the Whisper to start from and to compare with."""

    data: Path
    runs: Path
    whisper: str

    @property
    def words(self) -> Path:
        """The word lists."""
        return self.runs / "words"

    def test(self, name: str) -> Path:
        """The manifest of a part or a test set."""
        return self.runs / "tests" / f"{name.replace(' ', '_')}.jsonl"


def select(manifest: Path, output: Path, part: Part) -> Path:
    """Writes some of a manifest's utterances; keeps what is there."""
    if not output.exists():
        chosen = [each for each in Manifest(manifest) if each.id.startswith(part.sources or "")]
        write_manifest(chosen[:: part.every], output)
    return output


def prepare(places: Places, source: str | None) -> None:
    """Corpus, text tokenizer, word lists, training and test manifests, where they are missing."""
    if not (places.data / "cuts_train.jsonl").exists():
        voices13.prepare(str(places.data), source=source)
    for name, training in TRAININGS.items():
        for split in ("train", "dev"):
            part = Part(split, training.sources)
            select(places.data / f"cuts_{split}.jsonl", places.runs / name / f"{split}.jsonl", part)
        tokenizer = places.runs / name / "tokenizer"
        if not tokenizer.exists():
            train_tokenizer(places.runs / name / "train.jsonl", tokenizer, model_type="char", byte_fallback=False)
    if not all((places.words / f"{code}.tsv").exists() for code in LISTED):
        words.prepare(places.words, languages=LISTED)
    for name, part in PARTS.items():
        select(places.data / f"cuts_{part.split}.jsonl", places.test(name), part)
    for name, test in TESTS.items():
        if not places.test(name).exists():
            chosen = [each for part in test.parts for each in Manifest(places.test(part))]
            write_manifest((each for each in chosen if each.duration_s >= test.min_seconds), places.test(name))


def train_model(name: str, places: Places, fit_words: list[str]) -> None:
    """Trains a model, or goes on with its training, or does nothing where it is done."""
    folder, training = places.runs / name, TRAININGS[name]
    train(
        folder,
        [
            f"--config={CONFIG}",
            f"--data.train_manifest={folder / 'train.jsonl'}",
            f"--data.valid_manifest={folder / 'dev.jsonl'}",
            f"--data.tokenizer={folder / 'tokenizer'}",
            f"--model.pretrained.checkpoint={places.whisper}",
            f"--model.fine_tuning.lr={training.lr}",
            f"--model.fine_tuning.pretrained_share={training.pretrained_share}",
            f"--trainer.max_epochs={training.epochs}",
            *training.words,
        ],
        fit_words,
    )


def hear(system: str, test: Path, output: Path, places: Places) -> TranscribeResult:
    """Transcribes a test set with a model of ours (`voices13-ctc`, ...) or a peer (`whisper-int8-given`, ...)."""
    if system in PEERS:
        kind: Any
        told: Any
        _, kind, told = system.split("-")
        return whisper(str(test), str(output), model=places.whisper, compute_type=kind, language=told)
    name, chosen, *helped = system.split("-")
    head: Any = chosen
    options: dict[str, Any] = {"model": str(places.runs / name / "model"), "head": head, "precision": "bf16-mixed"}
    if chosen == "ctc":
        options["beam"] = 0
    if "words" in helped:
        options["words"] = str(places.words)
    options["few_languages"] = "few" in helped
    if "given" in helped:
        return transcribe_told(test, output, **options)
    return transcribe([str(test)], output=str(output), **options)


def measure(system: str, test_set: str, places: Places, results: ResultFile) -> None:
    """Transcribes and scores what results.json lacks."""
    test, output = places.test(test_set), places.runs / "heard" / system
    lines: dict[str, str] = {}
    for part in map(places.test, TESTS[test_set].parts):
        if not (output / part.name).exists():
            hear(system, part, output, places)
        texts = (output / part.name).read_text("utf-8").split("\n")
        lines |= {json.loads(line)["id"]: line for line in texts if line}
    hypothesis = output / "scored" / test.name
    write_text(hypothesis, "".join(f"{lines[each.id]}\n" for each in Manifest(test) if each.id in lines))
    report = score(test, hypothesis, fold_accents=UNACCENTED)
    facts = {"system": system, "test_set": test_set, **origin(ROOT)}
    trained_on = places.runs / system.partition("-")[0] / "train.jsonl"
    hours = {} if system in PEERS else {code: round(each, 3) for code, each in hours_of(trained_on).items()}
    # Who was told the language has identified none.
    untold: dict[str, Any] = dict.fromkeys(IDENTIFICATION) if "given" in system.split("-") else {}
    rows = [facts | row | untold | {"train_hours": hours.get(row["language"])} for row in language_rows(report)]
    results.add(rows)
    print(f"{system} on {test_set}: macro WER {report.macro.wer:.1f} %", flush=True)


def measure_all(
    places: Places, results: ResultFile, models: Sequence[str], peers: Sequence[str], fit_words: list[str]
) -> None:
    """Trains what is not trained, and measures what results.json lacks."""
    for name in models:
        train_model(name, places, fit_words)
    tests = {f"{name}-{head}": TRAININGS[name].tests for name in models for head in HEADS}
    tests |= dict.fromkeys(peers, tuple(TESTS))
    for system, test_sets in tests.items():
        for test_set in test_sets:
            if not results.select(system=system, test_set=test_set):
                measure(system, test_set, places, results)


def measure_speed(
    places: Places, results: ResultFile, models: Sequence[str], peers: Sequence[str], repeat: int = 3
) -> None:
    """Times the models that are there and the peers on the same utterances; the medians count.

    They take turns, so that each meets the same machine.
    """
    test = select(places.data / "cuts_test.jsonl", places.test("speed"), SPEED)
    systems = [f"{name}-{head}" for name in models for head in HEADS if (places.runs / name / "model").exists()]
    factors: dict[str, list[float]] = {system: [] for system in [*systems, *peers]}
    for turn in range(repeat):
        for system in factors:
            output = places.runs / "speed" / f"{system}-{turn}"
            factors[system].append(hear(system, test, output, places).real_time_factor)
    rows = [
        {"system": system, "test_set": "speed", "language": "all", "real_time_factor": round(float(np.median(each)), 5)}
        for system, each in factors.items()
    ]
    results.add([row | {"date": date.today().isoformat()} for row in rows])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; arguments that it does not know go to `mole-asr fit`.

    Returns:
        0, or 1 where something is wrong that the user can put right.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", help="folder of a multilingual Whisper in CTranslate2's format")
    parser.add_argument("--models", nargs="*", default=list(TRAININGS), choices=list(TRAININGS), metavar="MODEL")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    parser.add_argument("--data", type=Path, default=ROOT / "data/voices13", help="the corpus (%(default)s)")
    parser.add_argument("--source", help="folder with the Debian packages of the corpus, where apt cannot fetch them")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/whisper_mole", help="of the runs (%(default)s)")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results.json (%(default)s)")
    parser.add_argument("--speed", action="store_true", help="only time all systems, on a machine that is not in use")
    parser.add_argument("--table", action="store_true", help="only write the tables into README.md, and the pictures")
    options, fit_words = parser.parse_known_args(arguments)
    try:
        results = ResultFile(options.results / "results.json", ("system", "test_set"))
        if not options.table:
            if options.whisper is None:
                raise MoleError("--whisper: name the folder of a multilingual Whisper in CTranslate2's format")
            places = Places(options.data.absolute(), options.runs.absolute(), options.whisper)
            prepare(places, options.source)
            if options.speed:
                measure_speed(places, results, options.models, options.peers)
            else:
                measure_all(places, results, options.models, options.peers, fit_words)
        from tables import write_all

        print(write_all(results, options.results))
    except MoleError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
