"""The `transcribe` verb: files, folders and manifests in, text files out."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mole_asr.errors import MoleError, print_skipped
from mole_asr.files import atomic_path, check_folder, write_text
from mole_asr.transcribe.transcript import Transcript
from mole_asr.transcribe.writers import WRITERS

if TYPE_CHECKING:
    from mole_asr.corpus.manifest import Manifest
    from mole_asr.transcribe.pieces import Input
    from mole_asr.transcribe.transcriber import Transcriber


@dataclass(slots=True)
class TranscribeResult:
    """What was done.

    Attributes:
        files: recordings (or utterances of manifests) that have a transcript.
        audio_s: their length.
        seconds: time it took, loading of the model left out.
        failures: (id, reason) of each that was skipped.
    """

    files: int = 0
    audio_s: float = 0.0
    seconds: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of sound; 0 if there was none."""
        return self.seconds / self.audio_s if self.audio_s else 0.0

    def add(self, other: "TranscribeResult") -> None:
        """Adds the counts of another part of the work."""
        self.files += other.files
        self.audio_s += other.audio_s
        self.seconds += other.seconds
        self.failures += other.failures

    def write_stats(self, manifest: Path, more: Mapping[str, Any] | None = None) -> None:
        """Writes length, time and real-time factor beside the manifest that was written, as `x.stats.json`.

        Args:
            manifest: `x.jsonl`.
            more: what else to note.
        """
        stats = {"audio_s": self.audio_s, "seconds": self.seconds, "real_time_factor": self.real_time_factor}
        rounded = {key: round(value, 4) for key, value in stats.items()}
        write_text(manifest.with_suffix(".stats.json"), json.dumps({**rounded, **(more or {})}) + "\n")


def transcribe(
    files: list[str],
    model: str,
    language: str | None = None,
    format: str | Sequence[str] = "txt",
    output: str | None = None,
    batch_seconds: float = 240.0,
    beam: int | None = None,
    head: Literal["attention", "ctc"] | None = None,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    words: str | None = None,
    few_languages: bool = False,
    lm: str | None = None,
    lm_mode: Literal["rescore", "fusion"] = "rescore",
    lm_weight: float | None = None,
    ngram_weight: float | None = None,
    length_bonus: float | None = None,
) -> TranscribeResult:
    """Transcribes audio files, folders of them, and manifests.

    Each text is printed as soon as it is known. A file `x.wav` gives `x.txt`, `x.srt` and so on; the files of a folder
    keep their places below it; where two inputs would give the same name, the later one gets a number (`x-2.txt`).
    A manifest `x.jsonl` gives one file `x.jsonl` of the json format, a line an utterance, whatever the formats, and
    `x.stats.json` with `audio_s`, `seconds` and `real_time_factor`. A file that cannot be read is skipped and reported
    at the end.

    Args:
        files: audio files of any kind, folders to be walked for them, or manifests (.jsonl).
        model: folder of the trained model.
        language: code of the language spoken; left out, the model finds it.
        format: output formats, separated by commas: txt, json, srt, vtt, tsv, ctm.
        output: folder for the results. Left out, texts are only printed, and other formats and manifests go to the
            current folder.
        batch_seconds: seconds of sound that are recognised at once; less needs less memory.
        beam: texts that the search keeps. Of the CTC head: prefixes, with the n-grams of the training texts (default:
            `decode.beam.BEAM`); 0 decodes greedily, faster and by the sound alone. Of the attention head: drafts
            (default: `asr.text_search.BEAM`); 0 or 1 decodes greedily.
        head: which head of the model writes, where it has two: attention (the default) or ctc, which is faster.
        precision: 32-true, or bf16-mixed, which is faster where the processor has bfloat16 products.
        words: folder of word lists (`mole-asr prepare words`), which score within the attention head's search.
        few_languages: true: the recordings are in the same few languages, which need not be named, as in a folder of
            short clips. How often each is heard in a quarter of an hour of sound counts for all of it, so a text
            depends on the recordings around it, and a lone language among many others may be overheard. For the
            attention head; the first text comes later.
        lm: folder of a language model (`mole-asr fit --config conf/text/...`) that helps the CTC head.
        lm_mode: rescore (any language model: the texts that the search has found get a new order) or fusion (one that
            was trained with the recogniser's tokenizer: it scores within the search).
        lm_weight: of the language model's logarithm (default: `decode.decoder.WEIGHTS`).
        ngram_weight: of the logarithm of the n-grams; 0 leaves them out.
        length_bonus: for each token, because language models take something off for each.

    Returns:
        Counts and failures.

    Raises:
        MoleError: nothing to transcribe, an unknown format or language, a negative beam, a model that does not load, a
            language model that does not fit it, a text that would overwrite the `.txt` beside a recording, or results
            that cannot be written.
    """
    from mole_asr.transcribe.transcriber import load

    formats = _formats(format)
    recordings, manifests, failures = _find_inputs(files)
    folder = None if output is None and formats == ["txt"] else Path(output or ".")
    names = _output_names(recordings)
    if folder is not None and "txt" in formats:
        _check_references(recordings, [folder / f"{name}.txt" for name in names.values()])
    manifest_jobs = _manifest_jobs(manifests, folder or Path())
    results = [folder / f"{name}.{each}" for name in names.values() for each in formats] if folder is not None else []
    for path in [result for _, result in manifest_jobs]:
        results += [path, path.with_suffix(".stats.json")]
    _check_results(folder, results)
    weights = _weights(ngram_weight, lm_weight, length_bonus)
    if not batch_seconds > 0:
        raise MoleError(f"--batch-seconds {batch_seconds:g}: must be positive")
    if lm is None and (lm_weight is not None or lm_mode != "rescore"):
        raise MoleError("--lm-weight, --lm-mode: of which language model? give --lm FOLDER too")
    transcriber = load(model)
    transcriber.precision = precision
    _choose(transcriber, beam, head, words)
    transcriber.few_languages = few_languages
    if lm is not None:
        transcriber.use_language_model(lm, lm_mode)
    transcriber.choose_weights(weights)
    total = TranscribeResult(failures=failures)
    for transcript in _run(transcriber, recordings, language, batch_seconds, total):
        if folder is not None:
            for name in formats:
                write_text(folder / f"{names[transcript.id]}.{name}", WRITERS[name](transcript))
    for manifest, path in manifest_jobs:
        total.add(_transcribe_manifest(transcriber, manifest, path, language, batch_seconds))
    _print_summary(total)
    return total


def _check_results(folder: Path | None, results: Iterable[Path]) -> None:
    """Before the work, that its results can be written."""
    if folder is not None:
        check_folder(folder)
    results = list(results)
    for parent in sorted({path.parent for path in results}):
        check_folder(parent)
    seen: set[str] = set()
    for path in results:  # recordings have names of their own, but `x.stats.json` is that of the manifest x.jsonl too
        if str(path).lower() in seen:
            raise MoleError(f"{path}: two results would go there; give one of the inputs another name")
        seen.add(str(path).lower())
        if path.is_dir():
            raise MoleError(f"{path}: is a folder, but a result of that name goes there; give another --output")


def _choose(
    transcriber: "Transcriber", beam: int | None, head: Literal["attention", "ctc"] | None, words: str | None
) -> None:
    """What is given of these."""
    if beam is not None:
        transcriber.choose_beam(beam)
    if head is not None:
        transcriber.choose_head(head)
    if words is not None:
        transcriber.use_words(words)


def _weights(ngram: float | None, lm: float | None, bonus: float | None) -> dict[str, float]:
    """Those weights of a search that are given."""
    given = {name: value for name, value in (("ngram", ngram), ("lm", lm), ("bonus", bonus)) if value is not None}
    for name, value in given.items():
        if not math.isfinite(value) or (value < 0 and name != "bonus"):
            option = "--length-bonus" if name == "bonus" else f"--{name}-weight"
            raise MoleError(f"{option} {value:g}: must be finite" + ("" if name == "bonus" else " and not negative"))
    return given


def _check_references(recordings: Iterable[Path], results: Iterable[Path]) -> None:
    """A `.txt` beside a recording may be what somebody wrote down by ear: it is never overwritten."""
    from mole_asr.audio.read import AUDIO_SUFFIXES

    there = [result for result in map(Path.resolve, results) if result.exists()]
    beside = [path for folder in {result.parent for result in there} for path in folder.iterdir()]
    beside = [path for path in beside if path.suffix.lower() in AUDIO_SUFFIXES]
    references = {path.with_suffix(".txt").resolve() for path in (*recordings, *beside)}
    for result in there:
        if result in references:
            raise MoleError(f"{result}: stands beside a recording and would be overwritten; give another --output")


def _manifest_jobs(manifests: list[Path], folder: Path) -> "list[tuple[Manifest, Path]]":
    """Opens the manifests, so that a bad one stops the command before the work, and names their results."""
    from mole_asr.corpus.manifest import Manifest, first_entry, is_cut

    names = _output_names({path: Path(path.stem) for path in manifests})
    jobs = [(path, folder / f"{names[str(path)]}.jsonl") for path in manifests]
    for path, result in jobs:
        if result.resolve() in [other.resolve() for other in manifests]:
            raise MoleError(f"{path}: its transcripts would overwrite a manifest; give another folder with --output")
        if is_cut(first_entry(result)):
            raise MoleError(f"{result}: is a manifest and would be overwritten; give another folder with --output")
    opened = [(Manifest(path), result) for path, result in jobs]
    for manifest, _ in opened:
        if not len(manifest):
            raise MoleError(f"{manifest.path}: holds no utterance")
    return opened


def _transcribe_manifest(
    transcriber: "Transcriber", manifest: "Manifest", path: Path, language: str | None, batch_seconds: float
) -> TranscribeResult:
    """Writes one line an utterance to `path`, and the time it took beside it."""
    result = TranscribeResult()
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for transcript in _run(transcriber, manifest, language, batch_seconds, result):
            file.write(json.dumps(transcript.to_dict(), ensure_ascii=False) + "\n")
    result.write_stats(path)
    return result


def _run(
    transcriber: "Transcriber",
    inputs: "Iterable[Input]",
    language: str | None,
    batch_seconds: float,
    result: TranscribeResult,
) -> Iterator[Transcript]:
    """Prints and passes on each transcript; the counts are complete when the iterator is at its end."""
    start = time.perf_counter()
    for transcript in transcriber.transcribe(inputs, language=language, batch_seconds=batch_seconds):
        label = f" [{transcript.language}]" if transcript.language else ""
        print(f"{transcript.id}{label}: {transcript.text}", flush=True)
        result.files += 1
        result.audio_s += transcript.duration_s
        yield transcript
    result.seconds += time.perf_counter() - start
    result.failures += transcriber.failures


def _formats(format: str | Sequence[str]) -> list[str]:
    names = format.split(",") if isinstance(format, str) else format
    formats = list(dict.fromkeys(name.strip().lower() for name in names if name.strip()))
    unknown = [name for name in formats if name not in WRITERS]
    if unknown or not formats:
        raise MoleError(f"format '{', '.join(unknown)}': choose among {', '.join(WRITERS)}, separated by commas")
    return formats


def _find_inputs(files: list[str]) -> tuple[dict[Path, Path], list[Path], list[tuple[str, str]]]:
    """Sorts the arguments.

    Returns:
        Audio files, each once, with the name of its results (a relative path without suffix); manifests; failures.
    """
    from mole_asr.audio.read import find_audio

    recordings: dict[Path, Path] = {}
    manifests: list[Path] = []
    failures: list[tuple[str, str]] = []
    seen: set[str] = set()
    if "" in files:
        raise MoleError("an input is empty text; name audio files, folders or manifests")
    for path in map(Path, files):
        found, is_folder = [path], os.path.isdir(path)  # a path that cannot be looked at is named when it is read
        if is_folder:
            found, unseen = find_audio(path)
            failures += unseen
            if not found and not unseen:
                failures.append((str(path), "no audio file in this folder"))
        for file in found:
            if (real := os.path.realpath(file)) in seen:
                continue
            seen.add(real)
            if file.suffix.lower() == ".jsonl":
                manifests.append(file)
            else:
                recordings[file] = (file.relative_to(path) if is_folder else Path(file.name)).with_suffix("")
    if not recordings and not manifests:
        raise MoleError(": ".join(failures[0]) if failures else "no input: name audio files, folders or manifests")
    return recordings, manifests, failures


def _output_names(wanted_names: dict[Path, Path]) -> dict[str, Path]:
    """Names no two of which are the same, even where the file system ignores case: transcript id -> name."""
    taken: set[str] = set()
    names = {}
    for file, wanted in wanted_names.items():
        name, number = wanted, 1
        while str(name).lower() in taken:
            number += 1
            name = wanted.with_name(f"{wanted.name}-{number}")
        taken.add(str(name).lower())
        names[str(file)] = name
        if number > 1:
            print(f"{file}: '{wanted}' is the name of another input; results go to '{name}'", file=sys.stderr)
    return names


def _print_summary(total: TranscribeResult) -> None:
    """Goes to standard error: standard output is for the texts."""
    print(
        f"{total.files} recordings, {total.audio_s:.1f} s of sound in {total.seconds:.1f} s "
        f"(real-time factor {total.real_time_factor:.3f})",
        file=sys.stderr,
    )
    print_skipped(reason if name in reason else f"{name}: {reason}" for name, reason in total.failures)
