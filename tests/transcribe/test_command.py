import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mole_asr.asr.text_search import BEAM as TEXT_BEAM
from mole_asr.corpus.manifest import Utterance, write_manifest
from mole_asr.decode.beam import BEAM as CTC_BEAM
from mole_asr.decode.ngram import TokenNgram
from mole_asr.errors import MoleError
from mole_asr.transcribe import pieces
from mole_asr.transcribe.command import transcribe
from mole_asr.transcribe.transcriber import Transcriber
from mole_asr.transcribe.transcript import Transcript

from .conftest import write_sound

AB, CD = [2, 3, 0, 0], [4, 4, 5, 0]


@pytest.fixture(autouse=True)
def fake_load(monkeypatch: pytest.MonkeyPatch, transcriber: Transcriber, tmp_path: Path) -> None:
    monkeypatch.setattr("mole_asr.transcribe.transcriber.load", lambda folder: transcriber)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_prints_texts_and_writes_nothing_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sound(tmp_path / "a.wav", AB * 25)
    result = transcribe([str(path)], model="m")
    shown = capsys.readouterr()
    assert shown.out == f"{path} [en]: {' '.join(['ab'] * 25)}\n"
    assert "1 recordings, 4.0 s of sound" in shown.err
    assert (result.files, result.failures) == (1, [])
    assert result.audio_s == pytest.approx(4.0)
    assert result.seconds > 0
    assert result.real_time_factor == result.seconds / result.audio_s
    assert files_below(tmp_path / "cwd") == set()


def test_formats_go_to_the_current_folder_or_the_one_given(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.b.wav", AB)
    transcribe([str(path)], model="m", format="srt, json")
    assert files_below(tmp_path / "cwd") == {"a.b.srt", "a.b.json"}
    assert Transcript.from_dict(json.loads((tmp_path / "cwd" / "a.b.json").read_text())).text == "ab"
    transcribe([str(path)], model="m", output=str(tmp_path / "out"))
    assert files_below(tmp_path / "out") == {"a.b.txt"}
    transcribe([str(path)], model="m", format=["txt", "json", "srt", "vtt", "tsv", "ctm"], output=str(tmp_path / "all"))
    assert len(files_below(tmp_path / "all")) == 6


def test_folders_keep_their_shape_and_equal_names_get_numbers(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("x.wav", "one/x.wav", "one/two/X.flac", "x-2.wav"):
        write_sound(source / name, AB)
    (source / "x.txt").write_text("a reference")
    other, again = write_sound(tmp_path / "other" / "x.wav", CD), source / "one" / "x.wav"
    result = transcribe([str(source), str(other), str(again)], model="m", output=str(tmp_path / "out"))
    assert result.files == 5
    assert files_below(tmp_path / "out") == {"x.txt", "x-2.txt", "x-3.txt", "one/x.txt", "one/two/X.txt"}
    assert (tmp_path / "out" / "x-3.txt").read_text() == "cd\n"
    assert (source / "x.txt").read_text() == "a reference"


def test_a_text_beside_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "in" / "x.wav", AB)
    (tmp_path / "in" / "x.txt").write_text("a reference")
    for files, output in (([path.parent], path.parent), ([path], tmp_path / "out" / ".." / "in")):
        with pytest.raises(MoleError, match=r"x\.txt.*another --output"):
            transcribe([str(file) for file in files], model="m", output=str(output))
    transcribe([str(path)], model="m", format="json", output=str(path.parent))
    assert (tmp_path / "in" / "x.txt").read_text() == "a reference"
    other = write_sound(tmp_path / "noisy" / "x.flac", CD)  # another recording of the same name
    with pytest.raises(MoleError, match=r"x\.txt.*another --output"):
        transcribe([str(other)], model="m", output=str(path.parent))
    (tmp_path / "in" / "x.txt").unlink()
    transcribe([str(path)], model="m", output=str(path.parent))
    assert (tmp_path / "in" / "x.txt").read_text() == "ab\n"


def test_hidden_files_of_a_folder_are_left_alone(tmp_path: Path) -> None:
    for name in ("a.wav", "._a.wav", ".trash/b.wav"):
        write_sound(tmp_path / ".in" / name, AB)
    assert transcribe([str(tmp_path / ".in")], model="m").files == 1


def test_linked_folders_are_walked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sound(tmp_path / "elsewhere" / "a.wav", AB)
    write_sound(tmp_path / "in" / "b.wav", AB)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "loop.wav").symlink_to("loop.wav")
    result = transcribe([str(tmp_path / "in")], model="m", output="out")
    assert files_below(tmp_path / "cwd") == {"out/b.txt", "out/linked/a.txt"}
    assert [name for name, _ in result.failures] == [str(tmp_path / "in" / "loop.wav")]


def test_what_may_not_be_looked_at_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may look at everything, so that it is the system's word that is changed."""
    write_sound(tmp_path / "in" / "a.wav", AB)
    write_sound(tmp_path / "in" / "locked" / "b.wav", AB)
    private = write_sound(tmp_path / "private.wav", AB)
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    def read_audio(path: Any, **options: Any) -> Any:
        if path == private:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return audio_of(path, **options)

    audio_of = pieces.read_audio
    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(pieces, "read_audio", read_audio)
    result = transcribe([str(private), str(tmp_path / "in")], model="m")
    assert result.files == 1 and len(result.failures) == 2
    errors = capsys.readouterr().err
    assert "locked: Permission denied" in errors and f"Permission denied: '{private}'" in errors


def test_a_manifest_gives_one_file_and_its_speed(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", AB + CD)
    broken = tmp_path / "gone.wav"
    cuts = [
        Utterance("u1", path, 0.0, 0.16, 16000, "x", "en", num_samples=5120),
        Utterance("u2", path, 0.16, 0.16, 16000, "y", "en", num_samples=5120),
        Utterance("u3", broken, 0.0, 0.16, 16000, "z", "en", num_samples=5120),
    ]
    write_manifest(cuts, tmp_path / "cuts_test.jsonl")
    result = transcribe([str(tmp_path / "cuts_test.jsonl")], model="m", output=str(tmp_path / "out"))
    assert files_below(tmp_path / "out") == {"cuts_test.jsonl", "cuts_test.stats.json"}
    lines = (tmp_path / "out" / "cuts_test.jsonl").read_text(encoding="utf-8").splitlines()
    found = [Transcript.from_dict(json.loads(line)) for line in lines]
    assert [(transcript.id, transcript.text) for transcript in found] == [("u1", "ab"), ("u2", "cd")]
    stats = json.loads((tmp_path / "out" / "cuts_test.stats.json").read_text())
    assert set(stats) == {"audio_s", "seconds", "real_time_factor"}
    assert stats["audio_s"] == pytest.approx(0.32)
    assert [name for name, _ in result.failures] == ["u3"]
    with pytest.raises(MoleError, match="overwrite"):
        transcribe([str(tmp_path / "cuts_test.jsonl")], model="m", output=str(tmp_path))
    shutil.copy(tmp_path / "cuts_test.jsonl", tmp_path / "cwd")  # of another corpus
    with pytest.raises(MoleError, match=r"^cuts_test\.jsonl: is a manifest and would be overwritten"):
        transcribe([str(tmp_path / "cuts_test.jsonl")], model="m")


def test_a_recording_that_is_cut_short_is_skipped(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", AB)
    write_manifest([Utterance("u1", path, 0.0, 1.2, 16000, "x", "en", num_samples=19200)], tmp_path / "cuts.jsonl")
    result = transcribe([str(tmp_path / "cuts.jsonl")], model="m", output="out")
    assert result.files == 0 and result.failures == [("u1", f"{path}: holds 0.16 s of 1.20 s; cut short?")]


def test_failures_are_reported_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_sound(tmp_path / "good.wav", AB)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.wav").write_text("no sound")
    names = [str(tmp_path / name) for name in ("missing.wav", "bad.wav", "empty")]
    result = transcribe([*names, str(good)], model="m", output="out")
    assert result.files == 1
    assert {name for name, _ in result.failures} == set(names)
    assert files_below(tmp_path / "cwd") == {"out/good.txt"}
    errors = capsys.readouterr().err
    assert "3 skipped" in errors
    assert all(errors.count(name) == 1 for name in names)


def test_wrong_arguments_stop_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_sound(tmp_path / "good.wav", AB)
    with pytest.raises(MoleError, match=r"'xml'.*txt, json"):
        transcribe([str(good)], model="m", format="txt,xml")
    with pytest.raises(MoleError, match=r"'de'.*en, fr"):
        transcribe([str(good)], model="m", language="de")
    with pytest.raises(MoleError, match="beam -1: must be at least 0"):
        transcribe([str(good)], model="m", beam=-1)
    with pytest.raises(MoleError, match="no input"):
        transcribe([], model="m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MoleError, match="empty: no audio file"):
        transcribe([str(tmp_path / "empty")], model="m")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(MoleError, match=r"none\.jsonl: holds no utterance"):
        transcribe([str(tmp_path / "none.jsonl")], model="m")
    write_manifest([Utterance("u1", good, 0.0, 0.16, 16000, "x", "en", num_samples=2560)], tmp_path / "x.jsonl")
    twice = [str(write_sound(tmp_path / "x.stats.wav", AB)), str(tmp_path / "x.jsonl")]
    with pytest.raises(MoleError, match=r"x\.stats\.json: two results would go there"):
        transcribe(twice, model="m", format="json")
    (tmp_path / "cwd" / "sub").write_text("a file")
    write_sound(tmp_path / "in" / "sub" / "b.wav", AB)
    with pytest.raises(MoleError, match="sub: is a file; give a folder"):
        transcribe([str(tmp_path / "in")], model="m", format="json")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("beam", "wanted"), [(None, (CTC_BEAM, TEXT_BEAM)), (0, (0, 1)), (1, (1, 1)), (7, (7, 7))])
def test_the_beam_is_that_of_either_head(
    beam: int | None, wanted: tuple[int, int], tmp_path: Path, transcriber: Transcriber
) -> None:
    transcribe([str(write_sound(tmp_path / "a.wav", AB))], model="m", beam=beam)
    assert (transcriber.decoder.beam, transcriber.text_beam) == wanted


def test_importing_the_command_imports_no_torch() -> None:
    code = "import sys, mole_asr.transcribe.command; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"lm": "x", "beam": 0}, "--beam above 0"),
        ({"lm_weight": 0.5}, "--lm-weight.*--lm FOLDER"),
        ({"lm_mode": "fusion"}, "--lm-mode.*--lm FOLDER"),
        ({"ngram_weight": -1.0}, "--ngram-weight -1: must be finite and not negative"),
        ({"length_bonus": float("nan")}, "--length-bonus nan: must be finite"),
        ({"lm": "nowhere"}, r"nowhere.config\.json: cannot be read"),
    ],
)
def test_a_language_model_that_cannot_serve_is_refused(tmp_path: Path, options: dict[str, Any], part: str) -> None:
    path = write_sound(tmp_path / "a.wav", AB)
    with pytest.raises(MoleError, match=part):
        transcribe([str(path)], model="m", **options)


def test_a_language_model_serves_the_ctc_head(tmp_path: Path, transcriber: Transcriber) -> None:
    transcriber.head = "attention"
    path = write_sound(tmp_path / "a.wav", AB)
    with pytest.raises(MoleError, match="give --head ctc"):
        transcribe([str(path)], model="m", lm="x")


def test_weights_go_to_the_search(tmp_path: Path, transcriber: Transcriber, capsys: pytest.CaptureFixture[str]) -> None:
    """The texts know only "ad", and are believed as far as their weight goes."""
    transcriber.decoder.ngrams = {"en": TokenNgram.count([[2, 5]] * 10**4, vocab_size=10)}
    path = write_sound(tmp_path / "a.wav", AB)
    for weight, text in ((0.0, "ab"), (1.0, "ad")):
        transcribe([str(path)], model="m", ngram_weight=weight)
        assert capsys.readouterr().out == f"{path} [en]: {text}\n"
    transcribe([str(path)], model="m", length_bonus=50.0)  # every token is worth a lot
    assert len(capsys.readouterr().out.split(": ")[1]) > 4
    with pytest.raises(MoleError, match=r"ngram-weight, length-bonus: serve the search of the CTC head"):
        transcribe([str(path)], model="m", beam=0, ngram_weight=1.0)
    transcribe([str(path)], model="m", beam=0, ngram_weight=0.0)  # nothing is asked for
