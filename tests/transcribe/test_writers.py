import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.decode.word import Word
from mole_asr.transcribe.transcript import Segment, Transcript
from mole_asr.transcribe.writers import WRITERS


def transcript_of(words: list[tuple[str, float, float]], name: str = "a b.wav") -> Transcript:
    """Words as (text, pause before, length), one segment."""
    said, now = [], 0.0
    for text, pause_s, length_s in words:
        said.append(Word(text, now + pause_s, now + pause_s + length_s, 0.5))
        now += pause_s + length_s
    text = " ".join(word.text for word in said)
    segments = [Segment(0.0, now, text, said)] if said else []
    return Transcript(name, text, "en", 0.75, {"en": 0.9, "fr": 0.1}, now, segments)


words_lists = st.lists(
    st.tuples(st.text("abcdeéß&<>", min_size=1, max_size=15), st.floats(0, 3), st.floats(0.04, 2)), max_size=40
)
CUE = re.compile(r"(\d\d+):(\d\d):(\d\d)[,.](\d\d\d) --> (\d\d+):(\d\d):(\d\d)[,.](\d\d\d)")


def seconds(parts: tuple[str, ...]) -> float:
    hours, minutes, secs, ms = map(int, parts)
    assert minutes < 60
    assert secs < 60
    return 3600 * hours + 60 * minutes + secs + ms / 1000


def parse_cues(text: str) -> list[tuple[float, float, list[str]]]:
    cues = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        at = next((i for i, line in enumerate(lines) if " --> " in line), None)
        if at is not None:
            match = CUE.fullmatch(lines[at])
            assert match
            cues.append((seconds(match.groups()[:4]), seconds(match.groups()[4:]), lines[at + 1 :]))
    return cues


@settings(max_examples=80, deadline=None)
@given(words_lists)
def test_subtitles_read_back(words: list[tuple[str, float, float]]) -> None:
    transcript = transcript_of(words)
    srt, vtt = parse_cues(WRITERS["srt"](transcript)), parse_cues(WRITERS["vtt"](transcript))
    assert [cue[:2] for cue in srt] == [cue[:2] for cue in vtt]
    assert " ".join(" ".join(lines) for *_, lines in srt) == transcript.text
    for start_s, end_s, lines in srt:
        assert start_s < end_s
        assert end_s - start_s <= 7.002
        assert 1 <= len(lines) <= 2
        assert all(len(line) <= 42 for line in lines)
    starts = [cue[0] for cue in srt]
    assert starts == sorted(starts)
    assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(srt))
    if srt:
        assert srt[0][0] == pytest.approx(transcript.words[0].start_s, abs=1e-3)
        assert srt[-1][1] >= transcript.words[-1].end_s - 1e-3
    for cue, following in pairwise(srt):
        assert cue[1] - cue[0] >= 0.999 or cue[1] == following[0]


def test_a_text_without_spaces_is_cut_into_cues() -> None:
    text = "音声認識" * 25
    for seconds in (27.0, 4.0):
        srt = parse_cues(WRITERS["srt"](transcript_of([(text, 1.0, seconds)])))
        assert "".join("".join(lines) for *_, lines in srt) == text
        assert all(b - a <= 7.002 and len(lines) <= 2 and max(map(len, lines)) <= 42 for a, b, lines in srt)
        assert srt[0][0] == 1.0 and srt[-1][1] == pytest.approx(1 + seconds, abs=1e-3)
    thai = [line for *_, lines in parse_cues(WRITERS["srt"](transcript_of([("กี่" * 40, 0.0, 9.0)]))) for line in lines]
    assert "".join(thai) == "กี่" * 40 and all(line.startswith("ก") for line in thai)
    assert len(parse_cues(WRITERS["srt"](transcript_of([("hello", 0.0, 9.0)])))) == 1, "a word is not cut by its length"


def test_srt_is_numbered_and_vtt_has_its_header_and_escapes() -> None:
    transcript = transcript_of([("one", 0.0, 0.5), ("<two>", 4.0, 0.5), ("three", 4.0, 0.5)])
    assert WRITERS["srt"](transcript).split("\n\n")[1].startswith("2\n00:00:04,500 --> 00:00:05,500\n<two>")
    vtt = WRITERS["vtt"](transcript)
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\none\n")
    assert "&lt;two&gt;" in vtt


@pytest.mark.parametrize(
    ("time_s", "clock"), [(59.9996, "00:01:00,000"), (3599.9999, "01:00:00,000"), (36000.5, "10:00:00,500")]
)
def test_clock_rounds_and_carries(time_s: float, clock: str) -> None:
    transcript = Transcript("a", "x", "en", 1, {}, 1e5, [Segment(0, 1, "x", [Word("x", time_s, time_s + 1, 1)])])
    assert WRITERS["srt"](transcript).split("\n")[1].startswith(clock + " -->")


@given(words_lists)
def test_ctm_and_tsv_read_back(words: list[tuple[str, float, float]]) -> None:
    transcript = transcript_of(words)
    rows = [line.split(" ") for line in WRITERS["ctm"](transcript).splitlines()]
    assert [row[4] for row in rows] == [word.text for word in transcript.words]
    for row, word in zip(rows, transcript.words, strict=True):
        assert (row[0], row[1]) == ("a_b.wav", "1")
        assert float(row[2]) == pytest.approx(word.start_s, abs=6e-4)
        assert float(row[2]) + float(row[3]) == pytest.approx(word.end_s, abs=1.1e-3)
        assert float(row[5]) == word.confidence
    head, *lines = WRITERS["tsv"](transcript).splitlines()
    assert head == "start_ms\tend_ms\ttext"
    assert [line.split("\t")[2] for line in lines] == [segment.text for segment in transcript.segments]


@given(words_lists)
def test_json_and_txt_read_back(words: list[tuple[str, float, float]]) -> None:
    transcript = transcript_of(words)
    values = json.loads(WRITERS["json"](transcript))
    assert values == transcript.to_dict()
    back = Transcript.from_dict(values)
    assert back.to_dict() == values
    assert isinstance(back, Transcript)
    assert [word.text for word in back.words] == [word.text for word in transcript.words]
    assert " ".join(WRITERS["txt"](transcript).split()) == transcript.text


def test_json_form_is_the_published_one() -> None:
    values = transcript_of([("hi", 0.0, 0.51239)]).to_dict()
    word = {"text": "hi", "start_s": 0.0, "end_s": 0.512, "confidence": 0.5}
    assert values == {
        "id": "a b.wav",
        "text": "hi",
        "language": "en",
        "reliability": 0.75,
        "language_probabilities": {"en": 0.9, "fr": 0.1},
        "duration_s": 0.512,
        "segments": [{"start_s": 0.0, "end_s": 0.512, "text": "hi", "words": [word]}],
    }


def test_nothing_said_is_valid_everywhere() -> None:
    transcript = transcript_of([])
    assert {name: write(transcript) for name, write in WRITERS.items() if name != "json"} == {
        "txt": "",
        "srt": "",
        "vtt": "WEBVTT\n",
        "tsv": "start_ms\tend_ms\ttext\n",
        "ctm": "",
    }
