"""What was said in one recording or utterance: the result of `transcribe`."""

from dataclasses import asdict, dataclass, field
from typing import Any

from mole_asr.decode.word import Word


@dataclass(slots=True)
class Segment:
    """A stretch of the recording that was recognised at once; times in seconds from the start of the recording."""

    start_s: float
    end_s: float
    text: str
    words: list[Word] = field(default_factory=list)


@dataclass(slots=True)
class Transcript:
    """Text of one recording.

    Attributes:
        id: path of the file as it was given, or id of the utterance in its manifest.
        text: all of it, on one line.
        language: code of the likeliest language, or of the one that was asked for; "" if the recording is silent.
        reliability: how far the model trusts its language tokenizer here, 0 to 1.
        language_probabilities: code -> probability, adding up to 1; empty if the recording is silent.
        duration_s: length of the recording.
        segments: the text with its times.
    """

    id: str
    text: str
    language: str
    reliability: float
    language_probabilities: dict[str, float]
    duration_s: float
    segments: list[Segment] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; times to the millisecond, probabilities to four digits."""
        return _rounded(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Transcript":
        """Reads the JSON form."""
        segments = [Segment(**{**s, "words": [Word(**w) for w in s["words"]]}) for s in values.get("segments", [])]
        return cls(**{**values, "segments": segments})

    @property
    def words(self) -> list[Word]:
        """The words of all segments."""
        return [word for segment in self.segments for word in segment.words]


def _rounded(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item, key) for item in value]
    if isinstance(value, float):
        return round(value, 3 if key.endswith("_s") else 4)
    return value
