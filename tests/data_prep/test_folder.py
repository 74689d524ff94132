import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from mole_asr.corpus.manifest import Manifest, Utterance
from mole_asr.data_prep.folder import prepare
from mole_asr.data_prep.output import SPLITS, manifest_path
from mole_asr.errors import MoleError


def record(path: Path, text: str | None = None, seconds: float = 0.5, rate_hz: int = 8000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full((int(seconds * rate_hz), channels), 0.1), rate_hz)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def rows(output: Path) -> dict[str, tuple[str, Utterance]]:
    manifests = [(split, Manifest(manifest_path(output, split))) for split in SPLITS]
    return {utterance.id: (split, utterance) for split, manifest in manifests for utterance in manifest}


def test_folder_with_texts_beside(tmp_path: Path) -> None:
    source = tmp_path / "source"
    record(source / "en" / "a.wav", "Press 1.")
    record(source / "fr" / "anna" / "b.flac", "\ufeffÀ bientôt !\n", rate_hz=16000, channels=2)
    result = prepare(source, tmp_path / "out")
    assert result.failures == []
    assert sum(result.utterances.values()) == 2
    found = rows(tmp_path / "out")
    assert found["en_a"][1] == Utterance("en_a", source / "en/a.wav", 0.0, 0.5, 8000, "press one", "en", None, 4000)
    row = found["fr_anna_b"][1]
    assert (row.text, row.language, row.channels, row.num_samples) == ("à bientôt", "fr", 2, 8000)


def test_language_given(tmp_path: Path) -> None:
    record(tmp_path / "s" / "wav" / "a.wav", "uno")
    with pytest.raises(MoleError, match="--language"):
        prepare(tmp_path / "s", tmp_path / "out")
    prepare(tmp_path / "s", tmp_path / "out", language="it")
    assert rows(tmp_path / "out")["wav_a"][1].language == "it"


def test_the_innermost_language_folder_wins(tmp_path: Path) -> None:
    source = tmp_path / "it" / "source"
    for name in ("a.wav", "fr/en/b.wav", "fr/x/c.wav"):
        record(source / name, name)
    prepare(source, tmp_path / "out", language="es")
    found = {id: row.language for id, (_, row) in rows(tmp_path / "out").items()}
    assert found == {"a": "es", "fr_en_b": "en", "fr_x_c": "fr"}
    with pytest.raises(MoleError, match=r"a\.wav: of which language"):  # what is above the folder does not count
        prepare(source, tmp_path / "out")
    (source / "a.wav").unlink()
    for given, heard in ((None, "fr"), ("es", "es")):  # what is given says more than the name of the folder given
        prepare(source / "fr", tmp_path / "out", language=given)
        assert {id: row.language for id, (_, row) in rows(tmp_path / "out").items()} == {"en_b": "en", "x_c": heard}


def test_unusable_recordings_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "en"
    record(source / "good.wav", "good")
    record(source / "silent.wav", "...")
    record(source / "textless.wav")
    record(source / "latin.wav").with_suffix(".txt").write_bytes(b"caf\xe9")
    (source / "broken.wav").write_bytes(b"RIFF nonsense")
    (source / "broken.txt").write_text("broken")
    shutil.copy(source / "good.wav", source / os.fsdecode(b"caf\xe9.wav"))
    (source / "README.txt").write_text("no recording")
    result = prepare(source, tmp_path / "out")
    assert sum(result.utterances.values()) == 1
    assert sorted(Path(failure.split(": ")[0]).name for failure in result.failures) == [
        "broken.wav",
        "caf\\udce9.wav",
        "latin.wav",
        "silent.wav",
        "textless.wav",
    ]
    errors = capsys.readouterr().err
    assert errors.splitlines() == [f"{len(result.failures)} skipped:", *(f"  {each}" for each in result.failures)]
    assert "broken.wav" in (tmp_path / "out" / "left_out.tsv").read_text()


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    record(tmp_path / "audio" / "a.wav")
    record(tmp_path / "audio" / "b.wav")
    records = [
        {"path": "audio/a.wav", "text": 'He said, "yes"', "language": "en", "speaker": "Ada", "split": "test"},
        {"path": "audio/b.wav", "text": "sì", "language": "it", "speaker": "", "split": ""},
        {"path": "audio/none.wav", "text": "no", "language": "it", "speaker": "", "split": ""},
    ]
    table = tmp_path / f"table{suffix}"
    if suffix == ".jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in records))
    elif suffix == ".tsv":
        table.write_text("\n".join("\t".join(row) for row in [records[0].keys(), *(r.values() for r in records)]))
    else:
        quoted = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in records]
        table.write_text("\n".join([",".join(records[0]), *quoted]))
    result = prepare(table, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert len(result.failures) == 1 and "none.wav" in result.failures[0]
    assert found["audio_a"][0] == "test"
    assert (found["audio_a"][1].text, found["audio_a"][1].speaker) == ("he said yes", "Ada")
    assert found["audio_a"][1].audio_path == tmp_path / "audio" / "a.wav"
    assert (found["audio_b"][1].text, found["audio_b"][1].speaker) == ("sì", None)


def test_the_same_text_is_never_in_two_splits(tmp_path: Path) -> None:
    record(tmp_path / "a.wav")
    texts = [f"sentence number {i % 40}" for i in range(120)]
    lines = [{"path": "a.wav", "text": text, "split": "test" if i == 119 else None} for i, text in enumerate(texts)]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = prepare(table, tmp_path / "out", language="en", dev_percent=20, test_percent=20)
    splits: dict[str, set[str]] = {}
    for split, row in rows(tmp_path / "out").values():
        splits.setdefault(row.text, set()).add(split)
    assert len(splits) == 40
    assert all(len(found) == 1 for found in splits.values())
    assert splits["sentence number thirty nine"] == {"test"}
    assert all(count >= 3 for count in result.utterances.values())
    assert sum(result.utterances.values()) == 120  # one recording may serve several rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tsv", "audio\ttext\nx\ty\n", "t.tsv, row 1: it needs a path and a text"),
        ("t.csv", "path,text\na.wav,x\n", "t.csv, row 1: of which language"),
        ("t.csv", "path,text,language\na.wav,x,English\n", "t.csv, row 1: 'English' is no language code"),
        ("t.csv", "path,text,language\n.,x,en\n", "t.csv, row 1: '.' is no file"),
        ("t.csv", "path,text,language,split\na.wav,x,en,valid\n", "'valid' is no split"),
        ("t.csv", "path,text\na.wav,hello, my world\n", "t.csv, row 1: it has more cells .* commas between quotes"),
        ("t.tsv", "path\ttext\na.wav\thello\tworld\n", "t.tsv, row 1: it has more cells .* take out tabs in texts"),
        (
            "t.csv",
            'path,text,language\na.wav,x,en\nb.wav,"y,en\nc.wav,z,en\n',
            "t.csv: .* cannot be read behind row 1 ",
        ),
        ("t.csv", 'path,text,language\na.wav,"x" he said,en\n', "t.csv: .* cannot be read behind row 0 "),
        ("t.jsonl", '{"path": "a.wav", "text": ["x", "y"]}', r"row 1: its text is \['x', 'y'\], no text"),
        ("t.jsonl", "\n\n{", "t.jsonl, row 3: is no JSON object"),
        ("t.jsonl", "[]", "t.jsonl, row 1: is no JSON object"),
        (
            "t.jsonl",
            r'{"path": "a\ud83d.wav", "text": "x", "language": "en"}',
            "t.jsonl, row 1: holds half a surrogate",
        ),
        ("t.csv", b"path,text\na.wav,\xe9\n", "t.csv: the table cannot be read"),
        ("t.xlsx", "", "not a table that we read"),
    ],
)
def test_malformed_table_is_one_clear_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MoleError, match=message) as caught:
        prepare(path, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_empty_cells_beyond_the_header_do_no_harm(tmp_path: Path) -> None:
    record(tmp_path / "a.wav")
    (tmp_path / "t.csv").write_text("path,text,language\na.wav,yes,en,,\n")
    assert sum(prepare(tmp_path / "t.csv", tmp_path / "out").utterances.values()) == 1


def test_a_link_changes_no_language(tmp_path: Path) -> None:
    record(tmp_path / "in" / "en" / "a.wav", "a")
    record(tmp_path / "elsewhere" / "b.wav", "b")
    for name, target in (("all", "in/en"), ("es", "in/en"), ("fr", "elsewhere")):
        (tmp_path / "in" / name).symlink_to(tmp_path / target)
    prepare(tmp_path / "in", tmp_path / "out", language="it")
    assert {id: row.language for id, (_, row) in rows(tmp_path / "out").items()} == {"en_a": "en", "fr_b": "fr"}


def test_a_pipe_is_no_recording(tmp_path: Path) -> None:
    record(tmp_path / "en" / "a.wav", "a")
    os.mkfifo(tmp_path / "en" / "pipe.wav")
    assert not prepare(tmp_path / "en", tmp_path / "out").failures


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "en" / "a.wav", "a")
    locked = tmp_path / "en" / os.fsdecode(b"caf\xe9-locked")
    locked.mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # root may look into every folder, so that it is the system's word that is changed
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = prepare(tmp_path / "en", tmp_path / "out")
    assert result.failures == [f"{tmp_path / 'en'}/caf\\udce9-locked: Permission denied"]
    assert list(rows(tmp_path / "out")) == ["a"]


def test_other_user_errors(tmp_path: Path) -> None:
    with pytest.raises(MoleError, match="no such file or folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(MoleError, match="no usable recording; give a folder"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(MoleError, match="leave nothing to train on"):
        prepare(tmp_path, tmp_path / "out", dev_percent=50, test_percent=50)
    with pytest.raises(MoleError, match="no language code"):
        prepare(tmp_path, tmp_path / "out", language="english")
    (tmp_path / "x.wav").write_bytes(b"")
    with pytest.raises(MoleError, match=r"no usable recording; .*x\.wav"):
        prepare(tmp_path, tmp_path / "out", language="en")
