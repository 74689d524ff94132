from dataclasses import dataclass


@dataclass(slots=True)
class Word:
    """A recognised word: its text, when it was said (seconds), and how sure the model is of it (0 to 1)."""

    text: str
    start_s: float
    end_s: float
    confidence: float
