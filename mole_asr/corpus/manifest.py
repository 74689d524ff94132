"""Manifests: lhotse cut sets on disk (JSON lines), a table of numbers in memory.

A line is a lhotse cut with its recording and one supervision, so every lhotse tool reads our files and we read the
cuts of lhotse's corpus recipes. Nothing here imports lhotse, which takes seconds.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mole_asr.errors import MoleError
from mole_asr.files import atomic_path, check_is_no_pipe, is_unicode

# Decoders differ by some milliseconds; a recording that is cut short misses more than that.
MIN_SHARE_OF_DURATION = 0.9


@dataclass(frozen=True, slots=True)
class Utterance:
    """A stretch of a recording and what is said in it.

    Attributes:
        id: unique in its manifest.
        audio_path: the recording.
        start_s: where the utterance starts in the recording.
        duration_s: its length.
        sampling_rate_hz: of the recording as it lies on disk.
        text: what is said; empty where unknown.
        language: its code; empty where unknown.
        speaker: who speaks, if known.
        num_samples: length of the whole recording, in samples of one channel; 0 where unknown.
        channels: channels of the recording; they are averaged on reading.
    """

    id: str
    audio_path: Path
    start_s: float
    duration_s: float
    sampling_rate_hz: int
    text: str
    language: str
    speaker: str | None = None
    num_samples: int = 0
    channels: int = 1

    def read(self) -> np.ndarray:
        """Its samples, float32 [S], mono at 16 kHz; see `read_audio` for what is raised."""
        from mole_asr.audio.read import read_audio  # scores of texts need no library of sound

        return read_audio(self.audio_path, start_s=self.start_s, duration_s=self.duration_s)

    def read_whole(self) -> np.ndarray:
        """As `read`, but refuses a recording that ends long before the manifest says: its text would not fit.

        Raises:
            MoleError: so it is, or the recording cannot be read.
        """
        from mole_asr.audio.read import SAMPLING_RATE_HZ

        audio_S = self.read()
        found_s = len(audio_S) / SAMPLING_RATE_HZ
        if found_s < MIN_SHARE_OF_DURATION * self.duration_s:
            raise MoleError(f"{self.audio_path}: holds {found_s:.2f} s of {self.duration_s:.2f} s; cut short?")
        return audio_S


def write_manifest(utterances: Iterable[Utterance], path: str | Path) -> int:
    """Writes a lhotse cut set, one cut a line, with absolute audio paths.

    Returns:
        The number of utterances written.

    Raises:
        MoleError: two utterances have the same id.
    """
    seen: set[str] = set()
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for utterance in utterances:
            if utterance.id in seen:
                raise MoleError(f"{path}: the utterance id {utterance.id!r} stands twice; ids must be unique")
            seen.add(utterance.id)
            file.write(json.dumps(_to_cut(utterance), ensure_ascii=False) + "\n")
    return len(seen)


def first_entry(path: str | Path) -> dict[str, Any]:
    """The JSON object on a file's first filled line; empty where there is none, or it cannot be read.

    Raises:
        MoleError: it is a pipe, which could not be read again.
    """
    try:
        check_is_no_pipe(path)
        with Path(path).open(encoding="utf-8-sig") as file:
            entry = json.loads(next((line for line in file if line.strip()), ""))
    except (OSError, ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def is_cut(entry: dict[str, Any]) -> bool:
    """Whether a JSON object is a cut, and not a text or a transcript."""
    return not {"recording", "supervisions"}.isdisjoint(entry)


class Manifest:
    """A cut set (JSON lines) as arrays over its rows; a row's `Utterance` is read from the file when asked for.

    Memory does not grow with the texts: a row costs about 20 bytes. An instance may be pickled, forked and shared
    by threads.

    Attributes:
        path: the file.
        durations_s: float32[N].
        text_lengths: int32[N], characters.
        languages: the codes that occur, sorted.
        language_ids: int16[N], indices into `languages`; -1 where the cut names no language.

    Raises:
        MoleError: the file is missing or no cut set, or an id stands twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        if self.path.suffix == ".gz":
            raise MoleError(f"{path}: a compressed manifest cannot be read row by row; unpack it first (gunzip)")
        ids: set[str] = set()
        offsets, durations, lengths, names = [0], [], [], []
        self._open()
        try:
            with os.fdopen(os.dup(self._descriptor), "rb") as file:
                for line in file:
                    if line.isspace():
                        offsets[-1] += len(line)
                        continue
                    row = len(ids)
                    utterance = self._parse(line, row)
                    ids.add(utterance.id)
                    if len(ids) == row:
                        raise MoleError(f"{path}: the id {utterance.id!r} stands twice; ids must be unique")
                    offsets.append(offsets[-1] + len(line))
                    durations.append(utterance.duration_s)
                    lengths.append(len(utterance.text))
                    names.append(utterance.language)
        except OSError as error:
            raise MoleError(f"{path}: the manifest cannot be read ({error.strerror})") from None
        self._offsets = np.array(offsets, dtype=np.int64)
        self.durations_s = np.array(durations, dtype=np.float32)
        self.text_lengths = np.array(lengths, dtype=np.int32)
        self.languages = sorted(set(names) - {""})
        index = {name: i for i, name in enumerate(self.languages)} | {"": -1}
        self.language_ids = np.array([index[name] for name in names], dtype=np.int16)

    def __len__(self) -> int:
        return len(self.durations_s)

    def __getitem__(self, row: int) -> Utterance:
        """Reads one row from the file; negative rows count from the end."""
        row = range(len(self))[int(row)]
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        # pread keeps no position, so neither threads nor forked processes can disturb each other.
        return self._parse(os.pread(self._descriptor, end - start, start), row)

    def __iter__(self) -> Iterator[Utterance]:
        return (self[row] for row in range(len(self)))

    def _open(self) -> None:
        """Opens the file, for good: what replaces it at its path has other rows."""
        try:
            check_is_no_pipe(self.path)
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise MoleError(f"{self.path}: the manifest cannot be read ({error.strerror})") from None
        facts = os.fstat(self._descriptor)
        self._version = (facts.st_size, facts.st_mtime_ns)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
        if self._version != state["_version"]:
            raise MoleError(f"{self.path}: the manifest has changed since it was read; start again")

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def _parse(self, line: bytes, row: int) -> Utterance:
        try:
            return _from_cut(json.loads(line), self.path.parent)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise MoleError(f"{self.path}: row {row + 1} is no lhotse cut that we can read: {reason}") from None


def _to_cut(utterance: Utterance) -> dict[str, Any]:
    channels = list(range(utterance.channels))
    # A MonoCut reads one channel of its recording; we mean all of them.
    kind, channel = ("MonoCut", 0) if utterance.channels == 1 else ("MultiCut", channels)
    recording_id = utterance.audio_path.absolute().as_posix()
    return {
        "id": utterance.id,
        "start": utterance.start_s,
        "duration": utterance.duration_s,
        "channel": channel,
        "supervisions": [
            {
                "id": utterance.id,
                "recording_id": recording_id,
                "start": 0.0,
                "duration": utterance.duration_s,
                "channel": channel,
                "text": utterance.text,
                **({"language": utterance.language} if utterance.language else {}),
                **({"speaker": utterance.speaker} if utterance.speaker else {}),
            }
        ],
        "recording": {
            "id": recording_id,
            "sources": [{"type": "file", "channels": channels, "source": recording_id}],
            "sampling_rate": utterance.sampling_rate_hz,
            "num_samples": utterance.num_samples,
            "duration": utterance.num_samples / utterance.sampling_rate_hz,
        },
        "type": kind,
    }


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"its {key} is {value!a}, no number") from None


def _file_of(recording: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recording, and the one file that it must be."""
    if not isinstance(recording, dict):
        raise ValueError(f"its recording is {recording!a}, no object")
    if recording.get("transforms"):
        raise ValueError("its recording has transforms that lhotse would apply; save it as audio first")
    sources = recording["sources"]
    if len(sources) != 1 or sources[0]["type"] != "file":
        raise ValueError("its recording must be one file; save it as audio first (CutSet.save_audios)")
    return recording, sources[0]


def _from_cut(cut: dict[str, Any], folder: Path) -> Utterance:
    """Reads one cut; raises ValueError or KeyError with the reason where it is of a kind we do not read."""
    if cut.get("type", "MonoCut") not in ("MonoCut", "MultiCut"):
        raise ValueError(f"it is a {cut['type']}; save it as audio first (CutSet.save_audios)")
    recording, source = _file_of(cut["recording"])
    channels = source.get("channels", [0])
    if cut.get("type", "MonoCut") == "MonoCut" and len(channels) > 1:
        raise ValueError(f"it picks one of {len(channels)} channels, and we average them; save it as audio first")
    supervisions = sorted(cut.get("supervisions") or [], key=lambda supervision: supervision.get("start", 0.0))
    first = supervisions[0] if supervisions else {}
    start_s = _number("start", cut.get("start", 0))
    duration_s = _number("duration", cut.get("duration", recording.get("duration", 0)))
    if not 0 < duration_s < float("inf"):
        raise ValueError(f"its duration is {duration_s} s")
    if not 0 <= start_s < float("inf"):
        raise ValueError(f"its start is {start_s} s")
    sampling_rate_hz = _number("sampling_rate", recording["sampling_rate"])
    if not 1 <= sampling_rate_hz < float("inf"):
        raise ValueError(f"its sampling rate is {sampling_rate_hz}")
    speaker = "" if first.get("speaker") is None else first["speaker"]
    own_id, speaker = (str(value) if type(value) is int else value for value in (cut["id"], speaker))
    for name, value in (
        ("id", own_id),
        ("source", source["source"]),
        ("language", first.get("language") or ""),
        ("speaker", speaker),
        *(("text", supervision.get("text") or "") for supervision in supervisions),
    ):
        if not isinstance(value, str) or not is_unicode(value):
            raise ValueError(f"its {name} is {value!a}, no text")
    return Utterance(
        id=own_id,
        audio_path=folder / source["source"],
        start_s=start_s,
        duration_s=duration_s,
        sampling_rate_hz=int(sampling_rate_hz),
        text=" ".join(text for s in supervisions if (text := (s.get("text") or "").strip())),
        language=first.get("language") or "",
        speaker=speaker or None,
        num_samples=int(_number("num_samples", recording.get("num_samples", 0))),
        channels=len(channels),
    )
