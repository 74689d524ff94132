"""The `bench whisper` verb: a manifest transcribed by the peer to beat, Whisper as faster-whisper runs it.

Letters: S samples.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mole_asr.arguments import check_at_least
from mole_asr.audio.read import SAMPLING_RATE_HZ
from mole_asr.errors import MoleError, print_skipped
from mole_asr.files import atomic_path, write_text
from mole_asr.transcribe.command import TranscribeResult
from mole_asr.transcribe.transcript import Segment, Transcript

if TYPE_CHECKING:
    from mole_asr.corpus.manifest import Manifest, Utterance

# What differs from faster-whisper's defaults: each utterance stands alone, so there is no text before it.
_OPTIONS = {"condition_on_previous_text": False, "vad_filter": False}
_FILES = ("model.bin", "tokenizer.json")  # without them faster-whisper would look for them on a hub


def whisper(
    manifest: str,
    output: str,
    *,
    model: str,
    compute_type: Literal["int8", "float32"] = "int8",
    language: Literal["given", "detected"] = "detected",
    beam: int = 5,
    limit: int | None = None,
    threads: int = 2,
) -> TranscribeResult:
    """Transcribes a manifest with Whisper (Radford et al., arXiv 2212.04356), to be compared with a model of ours.

    Writes what `mole-asr transcribe` writes: `OUTPUT/x.jsonl`, a line an utterance, and `OUTPUT/x.stats.json`, so that
    `mole-asr score` treats both alike. The same command again goes on with an interrupted run. Settings are
    faster-whisper's own, but for the beam, and that an utterance knows nothing of the one before it.

    Args:
        manifest: utterances (.jsonl).
        output: folder for the results.
        model: folder of a Whisper model in CTranslate2's format.
        compute_type: of the products.
        language: "given" tells Whisper the manifest's language, "detected" lets it choose among all it knows.
        beam: width of its beam search.
        limit: only so many utterances from the start of the manifest.
        threads: of the CPU.

    Returns:
        Counts and failures.

    Raises:
        MoleError: faster-whisper is not installed, the model or the manifest cannot be read, Whisper does not know a
            language that it is given, or the folder holds the start of a run with other settings.
    """
    from mole_asr.corpus.manifest import Manifest

    check_at_least(1, beam=beam, threads=threads, limit=1 if limit is None else limit)
    cuts = Manifest(manifest)
    rows = range(len(cuts) if limit is None else min(limit, len(cuts)))
    path = Path(output) / f"{Path(manifest).stem}.jsonl"
    if path.resolve() == Path(manifest).resolve():
        raise MoleError(f"{path}: would overwrite the manifest; give another folder")
    peer = _load(Path(model), compute_type, threads)
    if language == "given":
        _check_languages(cuts, peer)
    settings = {
        "model": str(model),
        "compute_type": compute_type,
        "language": language,
        "beam": beam,
        "threads": threads,
    }
    part = path.with_suffix(".part.jsonl")
    lines = _begin(part, settings)
    result = TranscribeResult()
    with part.open("a", encoding="utf-8") as file:
        for utterance in _missing(cuts, rows, {line["transcript"]["id"] for line in lines}):
            try:
                seconds, transcript = _transcribe(peer, utterance, language == "given", beam)
            except MoleError as error:
                result.failures.append((utterance.id, str(error)))
                continue
            line = {"seconds": seconds, "transcript": transcript.to_dict()}
            lines.append(line)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{transcript.id} [{transcript.language}]: {transcript.text}", flush=True)
    _end(path, lines, {cuts[row].id for row in rows}, settings, result)
    part.unlink()
    return result


def _load(folder: Path, compute_type: str, threads: int) -> Any:
    """faster-whisper's model; the draws of its decoding at higher temperatures are the same in every run."""
    try:
        import ctranslate2
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise MoleError(f"faster-whisper cannot be imported ({error}); pip install 'mole-asr[peers]'") from None
    for name in _FILES:
        if not (folder / name).is_file():
            raise MoleError(f"{folder / name}: no such file; --model takes a Whisper folder in CTranslate2's format")
    ctranslate2.set_random_seed(0)
    try:
        return WhisperModel(str(folder), device="cpu", compute_type=compute_type, cpu_threads=threads)
    except (RuntimeError, ValueError) as error:
        raise MoleError(f"{folder}: cannot be loaded ({' '.join(str(error).split())}); copy the model anew") from None


def _check_languages(cuts: "Manifest", peer: Any) -> None:
    if (cuts.language_ids < 0).any():
        raise MoleError(f"{cuts.path}: an utterance names no language; take --language detected")
    unknown = [code for code in cuts.languages if code not in peer.supported_languages]
    if unknown:
        raise MoleError(f"{cuts.path}: this Whisper does not know {', '.join(unknown)}; take --language detected")


def _begin(part: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished lines of an interrupted run; a new run starts its file with its settings."""
    text = part.read_text(encoding="utf-8") if part.exists() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]  # what has no line end was cut off while written
    if lines and lines[0] != settings:
        raise MoleError(f"{part}: started with other settings, {lines[0]}; remove it or give another folder")
    write_text(part, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines or [settings]))
    return lines[1:]


def _missing(cuts: "Manifest", rows: range, done: set[str]) -> "Iterator[Utterance]":
    for row in rows:
        utterance = cuts[row]
        if utterance.id not in done:
            yield utterance


def _transcribe(peer: Any, utterance: "Utterance", is_given: bool, beam: int) -> tuple[float, Transcript]:
    """Seconds it took, reading included, and the transcript."""
    start = time.perf_counter()
    audio_S = utterance.read_whole()
    told = utterance.language if is_given else None
    found, info = peer.transcribe(audio_S, language=told, beam_size=beam, **_OPTIONS)
    segments = [Segment(segment.start, segment.end, segment.text.strip()) for segment in found]
    seconds = time.perf_counter() - start
    transcript = Transcript(
        id=utterance.id,
        text=" ".join(segment.text for segment in segments),
        language=info.language,
        reliability=min(1.0, info.language_probability),
        language_probabilities=dict(info.all_language_probs or [(info.language, info.language_probability)]),
        duration_s=len(audio_S) / SAMPLING_RATE_HZ,
        segments=segments,
    )
    return seconds, transcript


def _end(
    path: Path, lines: list[dict[str, Any]], ids: set[str], settings: dict[str, Any], result: TranscribeResult
) -> None:
    """Writes the wanted transcripts under their final name, and the time they took beside them."""
    wanted = [line for line in lines if line["transcript"]["id"] in ids]
    result.files = len(wanted)
    result.audio_s = sum(line["transcript"]["duration_s"] for line in wanted)
    result.seconds = sum(line["seconds"] for line in wanted)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line["transcript"], ensure_ascii=False) + "\n" for line in wanted)
    result.write_stats(path, settings)
    print(
        f"{result.files} utterances, {result.audio_s:.1f} s of sound in {result.seconds:.1f} s "
        f"(real-time factor {result.real_time_factor:.3f})",
        file=sys.stderr,
    )
    print_skipped(f"{name}: {reason}" for name, reason in result.failures)
