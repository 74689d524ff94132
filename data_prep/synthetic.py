"""Synthetic voices that read the texts of a train manifest, to be trained on beside the real recordings.

Where every language has one real voice, a model may tell languages apart by the voice. Here the same texts are read by
many: espeak-ng (GPL-3; formants; 52 variants of its voice, in any of its accents, at many pitches and speeds) and SVOX
Pico (Apache-2.0; diphones; one or two voices in English, Spanish, French and Italian). Ids and speakers begin with
`synthetic-`. For training alone: a test on synthetic speech says nothing about people.

Who reads an utterance, and how, depends on its id, language and copy alone, and the same reading gives the same
samples every time.
"""

import hashlib
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from mole_asr.corpus.manifest import Manifest, Utterance
from mole_asr.data_prep.clips import Clip, decode, store
from mole_asr.data_prep.output import PrepareResult, manifest_path, write_corpus
from mole_asr.errors import MoleError, print_skipped
from mole_asr.files import check_folder

ENGINES = ("espeak-ng", "pico")

# Variants of espeak-ng's voice that sound human and differ from each other: no robots, whispers or near-twins.
_MEN = """
    m1 m2 m3 m4 m5 m7 adam Alex Andy antonio benjamin boris david Denis ed edward gustave Henrique iven Jacky john
    kaukovalta Lee marcelo Mike Nguyen pablo paul quincy sandro travis victor norbert Michael Mario robert grandpa
    """.split()  # noqa: SIM905 (twenty lines otherwise)
_WOMEN = "f1 f2 f3 f4 f5 Alicia Andrea Annie belinda linda steph anika shelby grandma zac".split()  # noqa: SIM905
_ACCENTS = {
    "en": ("en-us", "en-us-nyc", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
    "es": ("es", "es-419"),
    "fr": ("fr-fr", "fr-be", "fr-ch"),
}
_PICO_VOICES = {"de": ("de-DE",), "en": ("en-US", "en-GB"), "es": ("es-ES",), "fr": ("fr-FR",), "it": ("it-IT",)}
_PICO_SHARE = 0.25  # of the texts that both can read
# In a process of its own for each text: after some hundred the library crashes, and what it says hangs on what it said.
_PICO = """
import sys
from py_nanotts import NanoTTS
voice, pitch, speed = sys.argv[1:]
text = sys.stdin.buffer.read().decode()
sys.stdout.buffer.write(NanoTTS().speak(text, voice, pitch=float(pitch), speed=float(speed)))
"""
_PROGRAMS_AT_ONCE = 8  # espeak-ng does little but wait in its tenth of a second


@dataclass(frozen=True, slots=True)
class Reading:
    """How a text is read.

    Attributes:
        engine: espeak-ng or pico.
        voice: the engine's name of it.
        pitch: espeak-ng: 0 to 99, of which 50 is the voice's own; pico: in percent of the voice's own.
        speed: espeak-ng: words a minute; pico: in percent of the voice's own.
    """

    engine: str
    voice: str
    pitch: int
    speed: int


@dataclass(frozen=True, slots=True)
class _Job:
    utterance: Utterance
    copy: int
    reading: Reading


def prepare(
    manifest: str | Path, output: str | Path, copies: int = 1, engines: Sequence[str] = ENGINES
) -> PrepareResult:
    """Has the texts of a train manifest read by synthetic voices.

    Writes `cuts_train.jsonl`, the audio (`audio/`) and the list of what was left out (`left_out.tsv`). To train on
    real and synthetic speech, join the manifests (`cat REAL/cuts_train.jsonl OUTPUT/cuts_train.jsonl > both.jsonl`).
    A second run synthesises only what is missing.

    Args:
        manifest: cut set whose texts are read.
        output: folder to write.
        copies: how often each text is read, each time by a voice of its own.
        engines: which synthesizers: espeak-ng, pico.

    Returns:
        How many readings were written, and those that failed.

    Raises:
        MoleError: an unknown or missing engine, no copies, or a manifest that cannot be read.
    """
    output = Path(output)
    check_folder(output)
    _check(copies, engines)
    if manifest_path(output, "train").resolve() == Path(manifest).resolve():
        raise MoleError(f"{output}: its cuts_train.jsonl would replace the manifest that is read; give another folder")
    jobs, left_out = _plan(Manifest(manifest), copies, engines)
    if not jobs:
        raise MoleError(f"{manifest}: it has no text in a language that {' or '.join(engines)} speaks")
    print(f"{len(jobs)} readings ...", flush=True)
    with ThreadPoolExecutor(_PROGRAMS_AT_ONCE) as pool:
        results = list(pool.map(partial(_store, output=output), jobs))
    utterances = [result for result in results if isinstance(result, Utterance)]
    failed = [(job.utterance, each) for job, each in zip(jobs, results, strict=True) if isinstance(each, MoleError)]
    if not utterances:
        raise failed[0][1]
    left_out += [(utterance.language, utterance.id, str(error)) for utterance, error in failed]
    write_corpus(output, {"train": utterances}, left_out)
    _print_summary(utterances, len(left_out))
    failures = [f"{utterance.id}: {error}" for utterance, error in failed]
    print_skipped(failures)
    return PrepareResult({"train": len(utterances)}, failures)


def choose(name: str, language: str, engines: Sequence[str]) -> Reading:
    """Draws who reads a text, and how; the same `name` gives the same reading.

    Args:
        name: of the text and the copy.
        language: a code that all of `engines` speak.
        engines: to choose from.
    """
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest(), 16))
    chances = [_PICO_SHARE if engine == "pico" else 1 - _PICO_SHARE for engine in engines]
    engine = str(rng.choice(engines, p=np.divide(chances, sum(chances))))
    voice = str(rng.choice(_voices(engine, language)))
    if engine == "pico":
        return Reading(engine, voice, int(rng.integers(80, 126)), int(rng.integers(85, 121)))
    variant = rng.choice(_WOMEN if rng.random() < 0.5 else _MEN)
    return Reading(engine, f"{voice}+{variant}", int(rng.integers(30, 71)), int(rng.integers(130, 196)))


def read_aloud(text: str, reading: Reading) -> tuple[np.ndarray, int]:
    """Synthesises a text.

    Returns:
        Samples float32 [S], full scale 1, and their sampling rate in Hz.

    Raises:
        MoleError: the engine fails.
    """
    if reading.engine == "pico":
        program = [sys.executable, "-c", _PICO, reading.voice, str(reading.pitch / 100), str(reading.speed / 100)]
    else:
        program = ["espeak-ng", "-v", reading.voice, "-p", str(reading.pitch), "-s", str(reading.speed)]
        program += ["-z", "--stdin", "--stdout"]
    result = subprocess.run(program, input=text.encode(), capture_output=True, check=False)
    if result.returncode != 0 or not result.stdout:
        complaint = " ".join(result.stderr.decode(errors="replace").split()) or f"exit code {result.returncode}"
        raise MoleError(f"{reading.engine} cannot read {text!r} with the voice {reading.voice}: {complaint}")
    if reading.engine == "pico":
        return np.frombuffer(result.stdout, dtype="<i2").astype(np.float32) / 32768, 16000
    return decode(result.stdout, f"espeak-ng's reading of {text!r}")


def _plan(source: Manifest, copies: int, engines: Sequence[str]) -> tuple[list[_Job], list[tuple[str, str, str]]]:
    """Returns who reads what, and (language, id, reason) of what nobody can read."""
    able = {language: [engine for engine in engines if _voices(engine, language)] for language in source.languages}
    jobs: list[_Job] = []
    left_out: list[tuple[str, str, str]] = []
    for utterance in source:
        if utterance.text and able.get(utterance.language):
            for copy in range(1, copies + 1):
                reading = choose(f"{utterance.id}#{copy}", utterance.language, able[utterance.language])
                jobs.append(_Job(utterance, copy, reading))
        else:
            reason = "no engine speaks the language" if utterance.text else "no text"
            left_out.append((utterance.language, utterance.id, reason))
    return jobs, left_out


def _store(job: _Job, output: Path) -> Utterance | MoleError:
    """Synthesises one reading, unless its file is there, and describes it; returns the error if that fails."""
    utterance, reading = job.utterance, job.reading
    # The name tells all that the sound depends on: a file that is there is the right one.
    digest = hashlib.sha256(repr((utterance.text, *astuple(reading))).encode()).hexdigest()[:20]
    path = output.absolute() / "audio" / utterance.language / f"{digest}.wav"
    speaker = f"synthetic-{reading.engine}-{reading.voice}"
    clip = Clip(utterance.language, digest, utterance.text, partial(read_aloud, utterance.text, reading), speaker)
    try:
        return store(clip, path, f"synthetic-{reading.engine}-{job.copy}-{utterance.id}")
    except MoleError as error:
        return error


def _check(copies: int, engines: Sequence[str]) -> None:
    if copies < 1:
        raise MoleError(f"copies: {copies}; give 1 or more")
    if not engines or not set(engines) <= set(ENGINES):
        raise MoleError(f"engines: {', '.join(engines) or 'none'}; choose from {', '.join(ENGINES)}")
    if "espeak-ng" in engines and shutil.which("espeak-ng") is None:
        raise MoleError("espeak-ng is missing; install it (apt install espeak-ng), or give --engines pico")
    if "pico" in engines:
        try:
            import py_nanotts  # noqa: F401
        except ImportError:
            raise MoleError(
                "py-nanotts is missing; pip install 'mole-asr[synthetic]', or give --engines espeak-ng"
            ) from None


def _voices(engine: str, language: str) -> tuple[str, ...]:
    """Returns the engine's voices of a language (espeak-ng: accents), none if it does not speak it."""
    if engine == "pico":
        return _PICO_VOICES.get(language, ())
    return tuple(voice for voice in _ACCENTS.get(language, (language,)) if voice.lower() in _espeak_languages())


@cache
def _espeak_languages() -> frozenset[str]:
    listing = subprocess.run(["espeak-ng", "--voices"], capture_output=True, text=True, check=True).stdout
    return frozenset(line.split()[1].lower() for line in listing.splitlines()[1:] if len(line.split()) > 1)


def _print_summary(utterances: Sequence[Utterance], num_left_out: int) -> None:
    count: Counter[str] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    voices: dict[str, set[str | None]] = defaultdict(set)
    for utterance in utterances:
        count[utterance.language] += 1
        seconds[utterance.language] += utterance.duration_s
        voices[utterance.language].add(utterance.speaker)
    print(f"{'language':9}{'readings':>9}{'voices':>7}{'hours':>7}")
    for language in sorted(count):
        print(f"{language:9}{count[language]:9d}{len(voices[language]):7d}{seconds[language] / 3600:7.2f}")
    if num_left_out:
        print(f"left out: {num_left_out} (named in left_out.tsv)")
