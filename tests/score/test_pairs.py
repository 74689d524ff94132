import json
import os
from pathlib import Path
from threading import Thread

import pytest

from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.errors import MoleError
from mole_asr.score.pairs import SentenceFile, pair, read_sentences


def write(path: Path, text: str) -> SentenceFile:
    path.write_text(text, encoding="utf-8")
    return read_sentences(path)


def test_a_manifest_is_read_with_its_facts(tmp_path: Path) -> None:
    audio = Path("/audio/a.wav")
    write_manifest([Utterance("a", audio, 0.0, 1.5, 16000, "Hallo", "de", speaker="s", num_samples=24000)],
                   tmp_path / "cuts.jsonl")  # fmt: skip
    read = read_sentences(tmp_path / "cuts.jsonl").sentences["a"]
    assert (read.text, read.language, read.speaker, read.duration_s) == ("Hallo", "de", "s", 1.5)


def test_transcripts(tmp_path: Path) -> None:
    line = {"id": "a", "text": "x y", "language": "en", "reliability": 0.5, "duration_s": 2.0, "segments": []}
    read = write(tmp_path / "h.jsonl", json.dumps(line) + "\n\n").sentences["a"]
    assert (read.text, read.language, read.reliability, read.duration_s) == ("x y", "en", 0.5, 2.0)


def test_tabs_make_ids_and_empty_text_is_text(tmp_path: Path) -> None:
    read = write(tmp_path / "r.txt", "\ufeffa\tx y\r\nb\t\n\n")
    assert {id: said.text for id, said in read.sentences.items()} == {"a": "x y", "b": ""}
    assert not read.numbered


def test_kaldi_text(tmp_path: Path) -> None:
    read = write(tmp_path / "text", "a x y\nb\n")
    assert {id: said.text for id, said in read.sentences.items()} == {"a": "x y", "b": ""}


def test_sentences_by_line_keep_empty_ones(tmp_path: Path) -> None:
    read = write(tmp_path / "r.txt", "hello world\n\nx\u2028y\n")
    assert [said.text for said in read.sentences.values()] == ["hello world", "", "x\u2028y"]
    assert read.numbered


def test_pairing_normalises_both_sides_and_names_the_missing(tmp_path: Path) -> None:
    said = write(tmp_path / "r.tsv", "a\tIch habe 2 Äpfel!\nb\tSo\n")
    heard = write(tmp_path / "h.tsv", "a\tich habe zwei apfel\n")
    pairs, missing = pair(said, heard, "de", ())
    assert (pairs[0].reference, pairs[0].hypothesis) == ("ich habe zwei äpfel", "ich habe zwei apfel")
    assert (pairs[1].hypothesis, missing) == ("", ["b"])
    folded, _ = pair(said, heard, "de", ["de"])
    assert folded[0].reference == folded[0].hypothesis


def test_combining_marks_are_kept(tmp_path: Path) -> None:
    said, heard = write(tmp_path / "r.tsv", "a\tहिन्दी\n"), write(tmp_path / "h.tsv", "a\tहनद\n")
    pairs, _ = pair(said, heard, "hi", ())
    assert (pairs[0].reference, pairs[0].hypothesis) == ("हिन्दी", "हनद")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h.tsv", "z\tx\nb\tx\n", "utterance 'z' not in"),
        ("h.tsv", "a\tx\na\ty\n", "stands twice"),
        ("h.txt", "x\n", "has no utterance ids"),
        ("h.jsonl", "", "is empty"),
        ("h.jsonl", '{"id": "a"}\n', "line 1 lacks 'id' or 'text'"),
        ("h.jsonl", "\n\n{no\n", "line 3 is not JSON"),
        ("h.jsonl", '{"id": "a", "text": "", "duration_s": NaN}\n', "line 1: duration_s nan is no length"),
        ("h.jsonl", '{"id": "a", "text": "x"}\nnonsense\n', "line 2 is not JSON"),
        ("h.jsonl", '{"id": "a", "text": "x", "reliability": "high"}\n', "reliability 'high'"),
        ("h.jsonl", '{"id": "a", "text": "x", "reliability": NaN}\n', "is not between 0 and 1"),
        ("h.jsonl", '{"id": "a", "text": "x", "duration_s": "2 s"}\n', "duration_s '2 s'"),
        ("h.jsonl", '{"id": null, "text": "x"}\n', "line 1 lacks 'id' or 'text'"),
        ("h.jsonl", '{"id": "a", "text": "x", "language": "\\ud800"}\n', "line 1: language '\\ud800' holds half"),
        ("half.txt", "a\tx\nb\n", "write id<TAB>text on every line"),
    ],
)
def test_bad_files_give_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    said = write(tmp_path / "r.tsv", "a\tx\nb\ty\n")
    with pytest.raises(MoleError) as caught:
        pair(said, write(tmp_path / name, text), None, ())
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_read_once_or_refused(tmp_path: Path) -> None:
    for name, content, found in (
        ("plain", "a\tx\nb\ty\n", 2),
        ("transcripts", '{"id": "a", "text": "x"}\n', 1),
        ("cuts", '{"id": "a", "recording": {}}\n', None),
    ):
        os.mkfifo(tmp_path / name)
        writer = Thread(target=(tmp_path / name).write_text, args=[content])
        writer.start()
        if found is None:
            with pytest.raises(MoleError, match="cuts: is a pipe or a device, and has to be read more than once"):
                read_sentences(tmp_path / name)
        else:
            assert len(read_sentences(tmp_path / name).sentences) == found
        writer.join()


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="cannot read"):
        read_sentences(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MoleError, match="not UTF-8"):
        read_sentences(tmp_path / "b.txt")


def test_unequal_line_counts(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="has 2 lines and"):
        pair(write(tmp_path / "r.txt", "x\ny\n"), write(tmp_path / "h.txt", "x\n"), None, ())
