"""Output formats: each a function from a transcript to the text of a file, in the table `WRITERS`."""

import json
import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, pairwise, zip_longest

from mole_asr.decode.word import Word
from mole_asr.transcribe.transcript import Transcript

_LINE_CHARACTERS = 42
_CUE_LINES = 2
_CUE_S = 7.0
# Nobody can read what stands for less time; a cue stays on screen so long if the next one leaves it the time.
_CUE_MIN_S = 1.0
# A pause this long ends a cue even if there is room in it.
_PAUSE_S = 1.5


def write_txt(transcript: Transcript) -> str:
    """The text, a line a segment."""
    return "".join(f"{segment.text}\n" for segment in transcript.segments)


def write_json(transcript: Transcript) -> str:
    """Everything there is: text, language, reliability, word times and confidences."""
    return json.dumps(transcript.to_dict(), ensure_ascii=False, indent=2) + "\n"


def write_srt(transcript: Transcript) -> str:
    """SubRip subtitles."""
    cues = (
        f"{number}\n{_clock(start_s, ',')} --> {_clock(end_s, ',')}\n{text}\n"
        for number, (start_s, end_s, text) in enumerate(_cues(transcript), start=1)
    )
    return "\n".join(cues)


def write_vtt(transcript: Transcript) -> str:
    """WebVTT subtitles."""
    cues = (
        f"\n{_clock(start_s, '.')} --> {_clock(end_s, '.')}\n{_escape(text)}\n"
        for start_s, end_s, text in _cues(transcript)
    )
    return "WEBVTT\n" + "".join(cues)


def write_tsv(transcript: Transcript) -> str:
    """A table of segments: start and end in milliseconds, text."""
    rows = (f"{_ms(s.start_s)}\t{_ms(s.end_s)}\t{' '.join(s.text.split())}\n" for s in transcript.segments)
    return "start_ms\tend_ms\ttext\n" + "".join(rows)


def write_ctm(transcript: Transcript) -> str:
    """NIST CTM, a line a word: recording, channel, start and length in seconds, word, confidence."""
    # Blanks part the columns of a CTM file, so that none may stand in a name or a word.
    name = "_".join(transcript.id.split())
    return "".join(
        f"{name} 1 {word.start_s:.3f} {max(0.0, word.end_s - word.start_s):.3f} "
        f"{'_'.join(word.text.split())} {word.confidence:.4f}\n"
        for word in transcript.words
    )


WRITERS: dict[str, Callable[[Transcript], str]] = {
    "txt": write_txt,
    "json": write_json,
    "srt": write_srt,
    "vtt": write_vtt,
    "tsv": write_tsv,
    "ctm": write_ctm,
}


def _cues(transcript: Transcript) -> Iterator[tuple[float, float, str]]:
    """(start_s, end_s, one or two lines) of what can be read at once."""
    cues: list[list[Word]] = []
    for segment in transcript.segments:
        for i, word in enumerate(chain.from_iterable(map(_parts, segment.words))):
            if i and _fits(cues[-1], word):
                cues[-1].append(word)
            else:
                cues.append([word])
    for cue, following in zip_longest(cues, cues[1:]):
        start_s, end_s = cue[0].start_s, cue[-1].end_s
        next_s = following[0].start_s if following else math.inf
        yield start_s, max(end_s, min(start_s + _CUE_MIN_S, next_s)), "\n".join(_lines(cue))


def _parts(word: Word) -> list[Word]:
    """A word that fits a line, or equal parts of a longer one that fit a line and a cue: some write no spaces."""
    if len(word.text) <= _LINE_CHARACTERS:
        return [word]
    limit = _LINE_CHARACTERS - 4  # room for marks
    count = max(math.ceil(len(word.text) / limit), math.ceil((word.end_s - word.start_s) / _CUE_S))
    cuts = [_beside_marks(word.text, round(part * len(word.text) / count)) for part in range(count + 1)]
    letter_s = (word.end_s - word.start_s) / len(word.text)
    return [
        replace(word, text=word.text[a:b], start_s=word.start_s + a * letter_s, end_s=word.start_s + b * letter_s)
        for a, b in pairwise(cuts)
    ]


def _beside_marks(text: str, cut: int) -> int:
    """The place itself, or the one before it that does not part a letter from its marks."""
    while 0 < cut < len(text) and unicodedata.category(text[cut]).startswith("M"):
        cut -= 1
    return cut


def _fits(cue: list[Word], word: Word) -> bool:
    return (
        word.end_s - cue[0].start_s <= _CUE_S
        and word.start_s - cue[-1].end_s < _PAUSE_S
        and len(_lines([*cue, word])) <= _CUE_LINES
    )


def _lines(words: list[Word]) -> list[str]:
    """Fills lines from the first on."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word.text) <= _LINE_CHARACTERS:
            lines[-1] += " " + word.text
        else:
            lines.append(word.text)
    return lines


def _ms(time_s: float) -> int:
    return round(1000 * time_s)


def _clock(time_s: float, point: str) -> str:
    """`01:02:03,456`; rounds first, so that 59.9996 s becomes one minute and not 60 seconds."""
    seconds, ms = divmod(_ms(time_s), 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{ms:03}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
