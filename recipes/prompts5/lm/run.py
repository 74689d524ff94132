"""A language model helps the recogniser of this recipe; see ../README.md.

`python recipes/prompts5/lm/run.py`, after `run.sh` and `mole-asr prepare texts data/texts`: texts, fit, weights chosen
on the dev split, error rates on the test split. Give the same command again after an interruption: what is done stays
done.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
from systems import SYSTEMS, Lists, Rates, choose
from tables import write_all
from texts import write_texts

from mole_asr.corpus.manifest import Manifest
from mole_asr.data_prep.prompts import UNACCENTED
from mole_asr.decode.beam import Weights
from mole_asr.decode.decoder import CtcDecoder
from mole_asr.decode.ngram import TokenNgram
from mole_asr.decode.rescore import text_log_probs
from mole_asr.errors import MoleError
from mole_asr.files import write_text
from mole_asr.fit import fit
from mole_asr.score.figures import language_rows
from mole_asr.score.results import ResultFile, Row
from mole_asr.score.score import ScoreReport, score
from mole_asr.text.checkpoint import load_text_model
from mole_asr.transcribe.command import transcribe
from mole_asr.transcribe.transcriber import Transcriber, load

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CONFIG = ROOT / "conf/text/prompts5.yaml"
AGAINST = "ngram"  # what `mole-asr transcribe` does by itself


@dataclass(frozen=True)
class Places:
    """Folders: of the prompts, of the other texts, of the recogniser, of the language model's run."""

    data: Path
    texts: Path
    model: Path
    output: Path

    @property
    def lm(self) -> Path:
        """The language model."""
        return self.output / "model"

    def split(self, name: str) -> Path:
        """The manifest of a split."""
        return self.data / f"cuts_{name}.jsonl"


@dataclass(frozen=True)
class Heard:
    """An utterance of the dev split as the recogniser's CTC head hears it: float [T, V], and the language it finds."""

    id: str
    log_probs_TV: np.ndarray
    language: str


class Listener(CtcDecoder):
    """Keeps what it is to decode, and says nothing."""

    def decode(self, log_probs: list[np.ndarray], languages: list[str]) -> list[list[int]]:
        """No tokens at all."""
        self.heard = list(zip(log_probs, languages, strict=True))
        return [[] for _ in log_probs]


def listen(transcriber: Transcriber, manifest: Path) -> list[Heard]:
    """What the recogniser hears; an utterance that is so long that it would be cut is left out."""
    listener, found = Listener(transcriber.tokenizer), []
    searching, transcriber.decoder = transcriber.decoder, listener
    for utterance in Manifest(manifest):
        listener.heard = []
        list(transcriber.transcribe([utterance]))
        if len(listener.heard) == 1:
            found.append(Heard(utterance.id, *listener.heard[0]))
    transcriber.decoder = searching
    return found


class Dev:
    """The dev split: error rates for any weights."""

    def __init__(self, places: Places) -> None:
        self.places, self.transcriber = places, load(places.model, "cpu")
        self.reference, self.hypothesis = places.split("dev"), places.output / "dev.jsonl"
        self.heard = listen(self.transcriber, self.reference)
        self.heard.sort(key=lambda each: -len(each.log_probs_TV))

    def choose(self, name: str, before: Row) -> list[Row]:
        """Chooses the weights of a system, after those of another; its rows."""
        system, decoder = SYSTEMS[name], self.transcriber.decoder
        decoder.fusion = decoder.rescorer = None
        decoder.beam = CtcDecoder.beam if system.beam is None else system.beam
        if system.mode is not None:
            self.transcriber.use_language_model(self.places.lm, system.mode)
        lists = Lists(decoder, [each.log_probs_TV for each in self.heard], [each.language for each in self.heard])

        reports: dict[Weights, ScoreReport] = {}

        def rates(weights: Weights) -> Rates:
            report = reports[weights] = self._score(lists.best(weights))
            print(f"{name} {weights}: macro WER {report.macro.wer:.2f} %, CER {report.macro.cer:.2f} %", flush=True)
            return report.macro.wer or 0.0, report.macro.cer or 0.0

        start = {key: before.get(key, 0.0) for key in ("ngram", "lm", "bonus")} | system.start
        weights = Weights(**start)
        if system.mode is None:
            rates(weights)
        else:
            weights, _ = choose(weights, rates)
        return [facts(name, "dev") | asdict(weights) | row for row in language_rows(reports[weights])]

    def _score(self, found: list[tuple[int, ...]]) -> ScoreReport:
        spelled = [self.transcriber.tokenizer.decode(list(ids)) for ids in found]
        lines = [{"id": each.id, "text": text} for each, text in zip(self.heard, spelled, strict=True)]
        write_text(self.hypothesis, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return score(self.reference, self.hypothesis, fold_accents=UNACCENTED)


def facts(system: str, split: str) -> Row:
    """What each row says first."""
    return {"system": system, "split": split, "date": date.today().isoformat()}


def measure(name: str, places: Places, chosen: Row) -> list[Row]:
    """Transcribes the test split with the weights that were chosen on dev; its rows."""
    system, test = SYSTEMS[name], places.split("test")
    weights = Weights(chosen["ngram"], chosen["lm"], chosen["bonus"])
    helped = {"lm": str(places.lm), "lm_mode": system.mode, "lm_weight": weights.lm} if system.mode else {}
    start = time.process_time()
    result = transcribe(
        [str(test)],
        str(places.model),
        output=str(places.output / name),
        beam=system.beam,
        ngram_weight=weights.ngram,
        length_bonus=weights.bonus,
        **helped,  # type: ignore[arg-type]
    )
    cost = (time.process_time() - start) / max(1e-9, result.audio_s)
    hypothesis, against = (places.output / each / test.name for each in (name, AGAINST))
    compared = against if name != AGAINST and against.exists() else None
    report = score(test, hypothesis, against=compared, fold_accents=UNACCENTED)
    common = facts(name, "test") | asdict(weights) | {"cpu_s_per_s": round(cost, 4), "wer_difference": None}
    if report.comparison is not None:
        found = report.comparison.macro["wer"]
        common["wer_difference"] = [round(value, 3) for value in (found.value, *found.interval)]
    print(f"{name}: macro WER {report.macro.wer:.1f} %", flush=True)
    return [common | row for row in language_rows(report)]


def measure_bits(places: Places) -> list[Row]:
    """Bits a letter of the test sentences, their ends included, by the n-grams and by the language model."""
    transcriber, lm = load(places.model, "cpu"), load_text_model(places.lm)
    utterances = list(Manifest(places.split("test")))
    rows = []
    for code in sorted({each.language or "" for each in utterances}):
        texts = [each.text for each in utterances if each.language == code]
        ids = [transcriber.tokenizer.encode(text) for text in texts]
        scale = -1 / math.log(2) / sum(len(text) + 1 for text in texts)
        ngrams = sum(ngram_log_prob(transcriber.decoder.ngrams[code], each) for each in ids)
        model = sum(text_log_probs(lm, texts))
        figures = {"ngram_bits": round(scale * ngrams, 4), "lm_bits": round(scale * model, 4)}
        rows.append(facts("bits", "test") | {"language": code} | figures)
    return rows


def ngram_log_prob(ngram: TokenNgram, ids: list[int]) -> float:
    """Natural logarithm of the probability of a text and its end."""
    steps = [*ids, -1]
    return sum(float(ngram.log_probs(ids[:place])[token]) for place, token in enumerate(steps))


def run(places: Places, results: ResultFile, fit_words: list[str]) -> None:
    """Does what results.json lacks."""
    folder = places.data / "lm"
    if not results.select(system="texts") or not (folder / "train.jsonl").exists():
        counts = write_texts(places.data, places.texts, folder)
        results.add([facts("texts", "train") | row for row in counts])
    if not (places.lm / "model.safetensors").exists():
        words = [f"--config={CONFIG}", f"--output={places.output}", f"--data.vocabulary={places.data / 'tokenizer'}"]
        words += [f"--data.train_texts={folder / 'train.jsonl'}", f"--data.valid_texts={folder / 'dev.jsonl'}"]
        fit([*words, *fit_words])
    if not results.select(system="bits"):
        results.add(measure_bits(places))
    missing = [name for name in SYSTEMS if not results.select(system=name, split="dev")]
    dev = Dev(places) if missing else None
    for name in missing:
        assert dev is not None
        rows = results.select(system=SYSTEMS[name].after, split="dev", language="all")
        results.add(dev.choose(name, rows[0] if rows else {}))
    for name in sorted(SYSTEMS, key=lambda name: name != AGAINST):
        if not results.select(system=name, split="test"):
            results.add(measure(name, places, results.select(system=name, split="dev", language="all")[0]))


def main(words: list[str] | None = None) -> int:
    """Runs the command; arguments that it does not know go to `mole-asr fit`.

    Returns:
        0, or 1 where something is wrong that the user can put right.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/prompts5", help="the prompts (%(default)s)")
    parser.add_argument("--texts", type=Path, default=ROOT / "data/texts", help="other texts (%(default)s)")
    parser.add_argument("--model", type=Path, default=ROOT / "runs/prompts5/model", help="recogniser (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/prompts5_lm", help="of the run (%(default)s)")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results.json (%(default)s)")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", help="for the tables (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only write the tables into the README")
    options, fit_words = parser.parse_known_args(words)
    try:
        results = ResultFile(options.results / "results.json", ("system", "split"))
        if not options.table:
            run(Places(options.data, options.texts, options.model, options.output), results, fit_words)
        print(write_all(results, options.readme))
    except MoleError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
