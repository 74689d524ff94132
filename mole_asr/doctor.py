"""The `doctor` verb: what is installed, what works, and how to get what is missing."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

DISTRIBUTION = "mole-asr"
REINSTALL = "in the folder of the source run `pip install -e .`"
_PYTHONS = ((3, 11), (3, 13))
# Modules that are not named like their packages.
_MODULES = {"protobuf": "google.protobuf", "PyYAML": "yaml"}
_CODECS = ("aac", "mp3", "opus", "vorbis", "flac", "amrnb", "g722")
_SOUNDFILE_FORMATS = ("WAV", "FLAC", "OGG", "MP3")
# CPUs without one of these compute bfloat16 in float32, and slowly.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        name: of the thing.
        found: its version or state; empty if there is nothing.
        problem: one line that says what is missing and what to do; None if all is well.
        essential: whether mole_asr does not work without it.
    """

    name: str
    found: str
    problem: str | None = None
    essential: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """All checks; `str(diagnosis)` is the text for the terminal."""

    checks: list[Check]

    @property
    def failures(self) -> list[str]:
        """A line for each problem without whose solution mole_asr does not work."""
        return [f"{check.name}: {check.problem}" for check in self.checks if check.problem and check.essential]

    @property
    def warnings(self) -> list[str]:
        """A line for each problem that touches only some uses."""
        return [f"{check.name}: {check.problem}" for check in self.checks if check.problem and not check.essential]

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{check.name:<{width}}  {check.found or 'missing'}" for check in self.checks]
        for title, problems in (("Missing:", self.failures), ("Worth knowing:", self.warnings)):
            if problems:
                lines += ["", title, *(f"  {problem}" for problem in problems)]
        return "\n".join([*lines, "", "Something is missing." if self.failures else "All that is needed works."])


def doctor() -> Diagnosis:
    """Checks Python, the packages, the devices, the audio back ends, and a round trip through a tiny model.

    Nothing is raised: what does not work is a line of the result.

    Returns:
        The checks; `failures` is empty if mole_asr works here.
    """
    parts: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("devices", _devices),
        ("threads", _threads),
        ("soundfile", _soundfile),
        ("PyAV", _av),
        ("apt-get", _apt),
        ("round trip", _round_trip),
    ]
    return Diagnosis([check for name, part in parts for check in _guarded(name, part)])


def save_tiny_model(folder: str | Path) -> Path:
    """Writes a whole model folder: an untrained model of two languages that takes a moment to run.

    Returns:
        The folder.
    """
    import torch

    from mole_asr.asr.checkpoint import save_model
    from mole_asr.asr.model import EncoderConfig, MoleModel
    from mole_asr.corpus.manifest import Utterance, write_manifest
    from mole_asr.corpus.text_tokenizer import train_tokenizer

    folder = Path(folder)
    texts = ["a quick brown fox jumps over the lazy dog", "portez ce vieux whisky au juge blond qui fume"]
    with tempfile.TemporaryDirectory() as scratch:
        manifest = Path(scratch) / "texts.jsonl"
        wav = Path(scratch) / "none.wav"
        write_manifest((Utterance(text[:1], wav, 0.0, 1.0, 16000, text, "en") for text in texts), manifest)
        tokenizer = train_tokenizer(manifest, scratch, vocab_size=64, byte_fallback=False, model_type="char")
    config = EncoderConfig(
        d_model=16,
        d_ff=32,
        num_blocks=2,
        num_mole_blocks=1,
        language_tokenizer_block=1,
        num_heads=2,
        kernel_size=3,
        intermediate_ctc_blocks=(1,),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_model(MoleModel(config, ["en", "fr"], tokenizer.vocab_size), tokenizer, folder)
    return folder


def _guarded(name: str, part: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The checks of one part; whatever it raises becomes a check too, so that the other parts are still made."""
    try:
        yield from part()
    except Exception as error:
        yield Check(name, "", f"{_one_line(error)}; {REINSTALL}")


def _python() -> Iterator[Check]:
    lowest, highest = _PYTHONS
    fits = lowest <= sys.version_info[:2] <= highest
    problem = None if fits else "3.11, 3.12 or 3.13 is needed; make a new environment with one of them"
    yield Check("python", f"{sys.version.split()[0]} ({sys.executable})", problem)


def _packages() -> Iterator[Check]:
    """Version of each package that pyproject.toml asks for, and whether it can be imported."""
    try:
        requirements = requires(DISTRIBUTION) or []
        yield Check(DISTRIBUTION, version(DISTRIBUTION))
    except PackageNotFoundError:
        yield Check(DISTRIBUTION, "", f"the package is not installed; {REINSTALL}")
        return
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement.name, str(requirement), requirement.specifier.contains)


def _package(name: str, wanted: str, fits: Callable[[str], bool]) -> Check:
    install = f"pip install '{wanted}'"
    try:
        found = version(name)
        import_module(_MODULES.get(name, name.replace("-", "_")))
    except PackageNotFoundError:
        return Check(name, "", f"not installed; {install}")
    except Exception as error:  # a broken binary package raises whatever it likes
        return Check(name, found, f"cannot be imported ({_one_line(error)}); {install} --force-reinstall")
    return Check(name, found, None if fits(found) else f"{found} does not fit; {install}")


def _devices() -> Iterator[Check]:
    import torch

    flags = _cpu_flags() & _BF16_FLAGS
    native = f"bfloat16 in hardware ({', '.join(sorted(flags))})" if flags else "no bfloat16 in hardware"
    slow = None if flags else "training in bf16-mixed is slow on this CPU; give `fit` --trainer.precision 32-true"
    yield Check("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {native}", slow, essential=False)
    if not torch.cuda.is_available():
        yield Check("cuda", f"no device (torch is built for CUDA {torch.version.cuda})", essential=False)
    for index in range(torch.cuda.device_count()):
        memory_gib = torch.cuda.get_device_properties(index).total_memory / 2**30
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
        yield Check(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {memory_gib:.0f} GiB, {bf16}")


def _cpu_flags() -> set[str]:
    """What the kernel says of the first CPU; nothing where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _threads() -> Iterator[Check]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    setting = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Check("threads", f"torch takes {torch.get_num_threads()} of {usable} CPUs (OMP_NUM_THREADS {setting})")


def _soundfile() -> Iterator[Check]:
    import soundfile

    formats = soundfile.available_formats()
    missing = [name for name in _SOUNDFILE_FORMATS if name not in formats]
    problem = f"libsndfile cannot read {', '.join(missing)}; pip install --upgrade soundfile" if missing else None
    found = f"libsndfile {soundfile.__libsndfile_version__}: {', '.join(sorted(formats))}"
    yield Check("audio: soundfile", found, problem, essential="WAV" in missing)


def _av() -> Iterator[Check]:
    import av
    from av.codec import codecs_available

    missing = [name for name in _CODECS if name not in codecs_available]
    problem = f"FFmpeg lacks {', '.join(missing)}; pip install --force-reinstall av" if missing else None
    here = ", ".join(name for name in _CODECS if name not in missing)
    yield Check("audio: PyAV", f"libavcodec {_dotted(av.library_versions['libavcodec'])}: {here}, ...", problem, False)


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _apt() -> Iterator[Check]:
    path = shutil.which("apt-get")
    problem = "`prepare prompts` cannot fetch its packages here; download them by hand and give it --source FOLDER"
    yield Check("apt-get", path or "", None if path else problem, essential=False)


def _round_trip() -> Iterator[Check]:
    """Saves a tiny model, loads it, and transcribes a second of noise from a file."""
    import numpy as np
    import soundfile

    from mole_asr.transcribe.transcriber import load

    with tempfile.TemporaryDirectory() as scratch:
        wav = Path(scratch) / "noise.wav"
        soundfile.write(wav, np.random.default_rng(0).normal(0.0, 0.1, 16000), 16000)
        transcriber = load(save_tiny_model(Path(scratch) / "model"))
        transcripts = list(transcriber.transcribe(wav))
    works = len(transcripts) == 1 and transcripts[0].language in ("en", "fr") and transcripts[0].duration_s == 1.0
    problem = None if works else f"one second of noise gave {transcripts or transcriber.failures}; {REINSTALL}"
    yield Check("round trip", f"save, load, transcribe on {transcriber.device}", problem)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
