"""Degraded copies of a test set: the same utterances in noise, or over a telephone.

What happens to an utterance depends on its id alone (and, for noise, on which others the manifest has), so that every
system is tested on the same files, whoever makes them.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from mole_asr.audio.augment import add_noise
from mole_asr.audio.read import SAMPLING_RATE_HZ, resample
from mole_asr.corpus.manifest import Manifest, Utterance, write_manifest
from mole_asr.data_prep.clips import write_wav
from mole_asr.data_prep.output import PrepareResult
from mole_asr.errors import MoleError, print_skipped

_SNR_DB = (5.0, 15.0)
_TALKERS = (3, 6)
_BAND_HZ = (300, 3400)
_EDGES_HZ = (100, 200)  # width of the filter's slopes, below and above the band
_TELEPHONE_RATE_HZ = 8000


def prepare(manifest: str | Path, output: str | Path, kind: str = "noise") -> PrepareResult:
    """Writes a degraded copy of a manifest, for tests.

    `noise`: babble (three to six other utterances of the manifest at once) and stationary noise (white or pink), in
    random shares, together 5 to 15 dB below the speech. `telephone`: the band from 300 to 3,400 Hz at 8 kHz, coded
    by G.711, mu-law or A-law by chance; stored at 16 kHz.

    Args:
        manifest: cut set to degrade.
        output: the manifest to write (`cuts_test_noisy.jsonl`); the audio goes into a folder of its name beside it.
        kind: noise or telephone.

    Returns:
        How many utterances were written, and those that could not be read and were skipped.

    Raises:
        MoleError: an unknown kind, a manifest that cannot be read, one without any utterance that can, or without two
            where noise needs others; or a copy would replace what it is made of.
    """
    kinds: dict[str, Callable[[Manifest, int, np.ndarray, np.random.Generator], np.ndarray]]
    kinds = {"noise": _in_noise, "telephone": _over_telephone}
    if kind not in kinds:
        raise MoleError(f"kind: {kind!r} is unknown; choose from {', '.join(kinds)}")
    output = Path(output)
    if output.suffix != ".jsonl":
        raise MoleError(f"{output}: name the manifest to write, such as {output}.jsonl")
    source = Manifest(manifest)
    if output.resolve() == source.path.resolve():
        raise MoleError(f"{output}: the copy would replace the manifest that it is made of; give another name")
    paths = _paths(source, output)
    readable_R, failures = _readable(source)
    if not len(readable_R):
        raise MoleError(f"{manifest}: no readable utterance; {failures[0] if failures else 'it is empty'}")
    if kind == "noise" and len(readable_R) < 2:
        raise MoleError(f"{manifest}: babble is made of other utterances, and {len(readable_R)} can be read; give more")
    output.unlink(missing_ok=True)  # what an interrupted run leaves must not look whole
    utterances = []
    for row in readable_R.tolist():
        utterance = source[row]
        audio_S = kinds[kind](source, row, readable_R, _generator(kind, utterance.id))
        # What would not fit into 16 bits is made softer, not clipped: clipping is no part of the task.
        audio_S = audio_S / max(1.0, float(np.abs(audio_S).max()))
        num_samples = write_wav(audio_S, SAMPLING_RATE_HZ, paths[utterance.id])
        utterances.append(_moved(utterance, paths[utterance.id], num_samples))
    write_manifest(utterances, output)
    hours = sum(utterance.duration_s for utterance in utterances) / 3600
    print(f"{output}: {len(utterances)} utterances, {hours:.2f} h ({kind})")
    print_skipped(failures)
    return PrepareResult({kind: len(utterances)}, failures)


def _paths(source: Manifest, output: Path) -> dict[str, Path]:
    """Where the recording of each utterance goes."""
    folder = output.absolute().with_suffix("")
    owners: dict[str, str] = {}
    for utterance in source:
        other = owners.setdefault(utterance.id.replace("/", "_"), utterance.id)
        if other != utterance.id:
            raise MoleError(f"{source.path}: the ids {other!r} and {utterance.id!r} name one file; change one of them")
    paths = {id: folder / f"{name}.wav" for name, id in owners.items()}
    originals = {utterance.audio_path.resolve() for utterance in source}
    for path in paths.values():
        if path.resolve() in originals:
            raise MoleError(f"{path}: is a recording of {source.path}, and a copy would replace it; give another name")
    return paths


def _readable(source: Manifest) -> tuple[np.ndarray, list[str]]:
    """Rows whose recording can be read, int64 [R], and what is wrong with the others."""
    rows, failures = [], []
    for row, utterance in enumerate(source):
        try:
            utterance.read_whole()
        except (MoleError, OSError) as error:
            failures.append(f"{utterance.id}: {error}")
        else:
            rows.append(row)
    return np.array(rows, np.int64), failures


def telephone_line(audio_S: np.ndarray, law: str) -> np.ndarray:
    """Sends speech over a telephone line.

    Args:
        audio_S: float32 [S], 16 kHz.
        law: of G.711: ULAW (mu-law) or ALAW.

    Returns:
        float32 [S], 16 kHz.
    """
    narrow_S = _band_pass(resample(audio_S, SAMPLING_RATE_HZ, _TELEPHONE_RATE_HZ))
    coded = io.BytesIO()
    soundfile.write(coded, np.clip(narrow_S, -1, 1), _TELEPHONE_RATE_HZ, format="WAV", subtype=law)
    coded.seek(0)
    decoded_S, _ = soundfile.read(coded, dtype="float32")
    return resample(decoded_S, _TELEPHONE_RATE_HZ, SAMPLING_RATE_HZ)[: len(audio_S)]


def _over_telephone(manifest: Manifest, row: int, readable_R: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return telephone_line(manifest[row].read(), str(rng.choice(["ULAW", "ALAW"])))


def _in_noise(manifest: Manifest, row: int, readable_R: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    audio_S = manifest[row].read()
    snr_db, babble_share = rng.uniform(*_SNR_DB), rng.uniform(0.2, 0.8)
    power = np.mean(np.square(audio_S)) * 10 ** (-snr_db / 10)
    babble_S = _babble(manifest, readable_R[readable_R != row], len(audio_S), rng)
    babble_S = babble_S * np.float32(np.sqrt(power * babble_share))
    return add_noise(audio_S, snr_db - 10 * np.log10(1 - babble_share), rng) + babble_S


def _babble(manifest: Manifest, others: np.ndarray, num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Some other utterances at once, each equally loud: float32 [num_samples] of power 1."""
    count = min(len(others), int(rng.integers(_TALKERS[0], _TALKERS[1] + 1)))
    babble_S = np.zeros(num_samples, np.float32)
    for other in rng.choice(others, count, replace=False):
        voice_S = manifest[other].read()
        voice_S = np.take(voice_S, rng.integers(len(voice_S)) + np.arange(num_samples), mode="wrap")
        babble_S += voice_S / max(float(voice_S.std()), 1e-5)
    return babble_S / max(float(np.sqrt(np.mean(np.square(babble_S)))), 1e-5)


def _band_pass(audio_S: np.ndarray) -> np.ndarray:
    """Keeps the telephone band of float32 [S] at 8 kHz; raised-cosine slopes, no delay."""
    padded = len(audio_S) + _TELEPHONE_RATE_HZ // 10  # the filter's ring must not come in at the beginning again
    frequencies_hz = np.fft.rfftfreq(padded, 1 / _TELEPHONE_RATE_HZ)
    low = np.clip((frequencies_hz - (_BAND_HZ[0] - _EDGES_HZ[0])) / _EDGES_HZ[0], 0, 1)
    high = np.clip(((_BAND_HZ[1] + _EDGES_HZ[1]) - frequencies_hz) / _EDGES_HZ[1], 0, 1)
    gain = (1 - np.cos(np.pi * low)) * (1 - np.cos(np.pi * high)) / 4
    return np.fft.irfft(np.fft.rfft(audio_S, padded) * gain, padded)[: len(audio_S)].astype(np.float32)


def _generator(kind: str, utterance_id: str) -> np.random.Generator:
    return np.random.default_rng(int(hashlib.sha256(f"{kind}:{utterance_id}".encode()).hexdigest(), 16))


def _moved(utterance: Utterance, path: Path, num_samples: int) -> Utterance:
    """The same utterance, whose recording is now the file `path` (16 kHz, mono) alone."""
    return replace(
        utterance,
        audio_path=path,
        start_s=0.0,
        duration_s=num_samples / SAMPLING_RATE_HZ,
        sampling_rate_hz=SAMPLING_RATE_HZ,
        num_samples=num_samples,
        channels=1,
    )
