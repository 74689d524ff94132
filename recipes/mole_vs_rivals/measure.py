"""One trained model on one test set: transcripts, error rates, language identification, who computed what.

Letters: E experts, N utterances, L layers of experts.
"""

import json
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan import TestSet

from mole_asr.asr.model import ModelOutput
from mole_asr.asr.parameters import Parameters, count_parameters
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.corpus.subset import thin
from mole_asr.data_prep.prompts import UNACCENTED
from mole_asr.files import atomic_path
from mole_asr.moe.losses import expert_counts
from mole_asr.score.figures import language_rows
from mole_asr.score.language_id import split_reliability
from mole_asr.score.results import Row
from mole_asr.score.score import score
from mole_asr.transcribe.transcriber import Transcriber, load

BINS = np.linspace(0, 1, 21)


@dataclass
class Heard:
    """What a transcription left.

    Attributes:
        seconds: of work.
        audio_s: that were transcribed.
        serves: language -> layers [L] of the number of frames [E] that each expert computed.
        parameters: of the model; of monolingual ones, of one of them.
    """

    seconds: float = 0.0
    audio_s: float = 0.0
    serves: dict[str, list[np.ndarray]] = field(default_factory=dict)
    parameters: Parameters = Parameters(0, 0)  # noqa: RUF009 (frozen)


def gather(test_set: TestSet, data: Path, output: Path) -> bool:
    """Writes the manifest of a test set.

    Returns:
        Whether all that it is made of is there.
    """
    paths = [data / name for name in test_set.manifests]
    if not all(path.exists() for path in paths):
        return False
    chosen = chain.from_iterable(Manifest(path) for path in paths)
    write_manifest((u for u in chosen if not test_set.prefixes or u.id.startswith(test_set.prefixes)), output)
    if test_set.share < 1:
        thin(output, output, dict.fromkeys(Manifest(output).languages, test_set.share))
    return True


def transcribe(models: dict[str, Path], manifest: Path, output: Path, told: bool) -> Heard:
    """Transcribes a manifest greedily, without n-grams, one language after another.

    Args:
        models: language -> folder of the model that hears it; the same one for all, but for monolingual models.
        manifest: to transcribe.
        output: JSON lines to write.
        told: whether the model is told the language.
    """
    table, heard = Manifest(manifest), Heard()
    loaded: dict[Path, Transcriber] = {}
    several = len(set(models.values())) > 1
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, language in enumerate(table.languages):
            folder = models[language]
            if folder not in loaded:
                loaded[folder] = load(folder)
                loaded[folder].decoder.beam = 0
            transcriber = loaded[folder]
            heard.parameters = count_parameters(transcriber.model)
            utterances = [table[int(row)] for row in np.flatnonzero(table.language_ids == number)]
            with _counting(transcriber.model, heard, language):
                start = time.perf_counter()
                lines = list(_lines(transcriber, utterances, language if told else None, named=not (told or several)))
                heard.seconds += time.perf_counter() - start
            heard.audio_s += sum(utterance.duration_s for utterance in utterances)
            file.writelines(lines)
    return heard


def _lines(transcriber: Transcriber, utterances: list[Utterance], language: str | None, named: bool) -> Iterator[str]:
    """A line of JSON an utterance; language and reliability where the model found them by itself."""
    for transcript in transcriber.transcribe(utterances, language=language):
        found = {"language": transcript.language, "reliability": transcript.reliability} if named else {}
        yield json.dumps({"id": transcript.id, "text": transcript.text, **found}, ensure_ascii=False) + "\n"


@contextmanager
def _counting(model: torch.nn.Module, heard: Heard, language: str) -> Iterator[None]:
    """Counts the frames that each expert computes."""

    def count(module: torch.nn.Module, inputs: Any, output: ModelOutput) -> None:
        plans = [plan.to_token_layout(output.frames.rows.num_rows) for plan in output.decision.plans]
        counts = [expert_counts(plan.expert_ids, plan.num_experts).cpu().numpy() for plan in plans]
        sums = heard.serves.setdefault(language, [np.zeros_like(counts_E) for counts_E in counts])
        for sums_E, counts_E in zip(sums, counts, strict=True):
            sums_E += counts_E

    handle = model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


def figures(manifest: Path, hypothesis: Path, heard: Heard) -> tuple[list[Row], dict[str, Any], dict[str, Any]]:
    """Scores transcripts.

    Returns:
        A row a language and one for "all"; the test set's utterances; the details of this run.
    """
    report = score(manifest, hypothesis, fold_accents=UNACCENTED)
    languages = [pair.language for pair in report.pairs]
    codes = sorted(set(languages))
    utterances = {
        "ids_crc": zlib.crc32("\n".join(pair.id for pair in report.pairs).encode()),
        "codes": codes,
        "languages": [codes.index(code) for code in languages],
        "words": report.counts_N4[:, 1].tolist(),
        "characters": report.counts_N4[:, 3].tolist(),
    }
    reliability, right = split_reliability(report.pairs)
    details = {
        "word_errors": report.counts_N4[:, 0].tolist(),
        "character_errors": report.counts_N4[:, 2].tolist(),
        "reliability_right": np.histogram(reliability[right], BINS)[0].tolist(),
        "reliability_wrong": np.histogram(reliability[~right], BINS)[0].tolist(),
        "serves": {
            language: [np.round(np.float64(sums_E) / max(sums_E.sum(), 1), 3).tolist() for sums_E in layers]
            for language, layers in heard.serves.items()
        },
    }
    return language_rows(report), utterances, details
