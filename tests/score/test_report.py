import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mole_asr.asr.routing import Routing
from mole_asr.errors import MoleError
from mole_asr.score.charts import read_curves
from mole_asr.score.page import align, direction, worst_utterances
from mole_asr.score.pairs import Pair
from mole_asr.score.report import report
from mole_asr.score.score import score

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = "<script>alert(1)</script>"


class Checker(HTMLParser):
    """Checks that every element is closed in order; collects texts, ids and what would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    said = [{"id": f"u{i}", "text": "good morning all", "language": "en", "duration_s": 3.0} for i in range(14)]
    said.append({"id": EVIL, "text": "مرحبا بكم جميعا", "language": "ar", "duration_s": 3.0})
    heard = [
        {**line, "text": "good" if i % 2 else f"{EVIL} morning", "language": "en", "reliability": i / 15}
        for i, line in enumerate(said)
    ]
    for name, lines in (("ref", said), ("hyp", heard)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "ref.jsonl", tmp_path / "hyp.jsonl"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "epoch,lr,step,train/loss,valid/cer,valid/loss\n0,0.1,0,5.0,,\n0,,10,4.0,,\n0,,10,,80.5,4.5\n1,,20,nan,,\n1,,30,3"
    )
    return folder.parent


ROUTING = Routing(
    id="u1",
    text=f"good {EVIL}",
    languages=["ar", "en"],
    frame_shift_s=0.04,
    evidence_TN=np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]]),
    reliability=0.75,
)


def test_everything(files: tuple[Path, Path], logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # tests/asr/test_routing.py draws the picture of a model; torch stays out of here.
    monkeypatch.setattr("mole_asr.score.report._routing", lambda model, reference: ROUTING)
    stats = {"audio_s": 45.0, "seconds": 9.0, "real_time_factor": 0.2, "parameters": 123, "macro": "of a stranger"}
    files[1].with_suffix(".stats.json").write_text(json.dumps(stats))
    found = report(*files, tmp_path / "out", logs=logs, model="model", seconds=700)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["macro"]["wer"] == found.macro.wer and written["macro"]["cer"] == found.macro.cer
    assert written["seconds"] == 700 and written["transcribe_seconds"] == 9 and written["parameters"] == 123
    assert written["real_time_factor"] == pytest.approx(0.2)
    assert {"wer", "cer", "utterances", "hours", "language_id_accuracy", "wer_interval", "cer_interval",
            "reliability_right", "reliability_wrong"} <= written["languages"]["en"].keys()  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    checked = Checker(page)
    assert checked.tags.count("svg") == 3 and checked.tags.count("article") == 10
    assert "script" not in checked.tags and "&lt;script&gt;" in page
    assert EVIL in checked.text  # the id and the text stand there, as text
    assert all(link.startswith(("#", "data:")) for link in checked.links) and checked.links
    assert len(set(checked.ids)) == len(checked.ids)
    assert {link[1:] for link in checked.links if link.startswith("#")} <= set(checked.ids)
    assert 'dir="rtl" lang="ar"' in page
    assert "real-time factor: 0.200" in checked.text


def test_sections_without_facts_are_left_out(files: tuple[Path, Path], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"id": line["id"], "text": line["text"]}) + "\n" for line in lines))
    report(files[0], plain, tmp_path / "out")
    checked = Checker((tmp_path / "out" / "report.html").read_text())
    assert "svg" not in checked.tags and "Training" not in checked.text and "Routing" not in checked.text


def test_times_that_are_not_known_are_null(files: tuple[Path, Path], tmp_path: Path) -> None:
    report(*files, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [written[key] for key in ("seconds", "transcribe_seconds", "real_time_factor")] == [None] * 3


@pytest.mark.parametrize("text", ["{", "[]", '{"seconds": "9"}', '{"seconds": NaN}', '{"seconds": -1}'])
def test_bad_stats(files: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    files[1].with_suffix(".stats.json").write_text(text)
    with pytest.raises(MoleError, match=r"hyp\.stats\.json"):
        report(*files, tmp_path / "out")


def test_a_perfect_score_has_no_worst(files: tuple[Path, Path], tmp_path: Path) -> None:
    report(files[0], files[0], tmp_path / "out")
    assert "worst" not in Checker((tmp_path / "out" / "report.html").read_text()).text


def test_the_page_of_score_shows_the_comparison(files: tuple[Path, Path], tmp_path: Path) -> None:
    score(*files, by="language", against=files[0], output=tmp_path / "x.html")
    assert "WER (macro): +" in Checker((tmp_path / "x.html").read_text()).text


def test_alignment() -> None:
    words = align(Pair("a", "the cat sat down", "a cat sat", "en"))
    assert [(word.kind, word.reference, word.hypothesis) for word in words] == [
        ("substitute", "the", "a"), ("equal", "cat", "cat"), ("equal", "sat", "sat"), ("delete", "down", "")
    ]  # fmt: skip
    assert [word.kind for word in align(Pair("a", "", "x y", "en"))] == ["insert", "insert"]


def test_the_worst_come_in_order(tmp_path: Path) -> None:
    (tmp_path / "r.tsv").write_text("right\tabc\nhalf\tabcd\nfull\tab\nlong\tabcd\nsilence\t\n")
    (tmp_path / "h.tsv").write_text("right\tabc\nhalf\tabxx\nfull\txx\nlong\txxxx\nsilence\tyes\n")
    worst = worst_utterances(score(tmp_path / "r.tsv", tmp_path / "h.tsv"))
    assert [utterance.pair.id for utterance in worst] == ["silence", "long", "full", "half"]
    assert [utterance.cer for utterance in worst] == [None, 100, 100, 50]


def test_direction() -> None:
    assert [direction(text) for text in ("abc", "12 שלום", "مرحبا x", "", "...")] == ["ltr", "rtl", "rtl", "ltr", "ltr"]


def test_curves_are_sparse_and_a_resumed_run_continues(logs: Path) -> None:
    assert read_curves(logs) == {"train/loss": [(0, 5), (10, 4), (30, 3)], "valid/cer": [(10, 80.5)],
                                 "valid/loss": [(10, 4.5)]}  # fmt: skip
    resumed = logs / "version_1"
    resumed.mkdir()
    (resumed / "metrics.csv").write_text("step,train/loss\n20,3.5\n40,2.5\n")
    assert read_curves(logs)["train/loss"] == [(0, 5), (10, 4), (20, 3.5), (40, 2.5)]


def test_missing_inputs(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(MoleError, match=r"no metrics\.csv"):
        read_curves(tmp_path / "none")


def test_what_cannot_be_written_or_read_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MoleError, match=r"^output .*: is a file; give a folder$"):
        report(*files, files[0])
    with pytest.raises(MoleError, match="Is a directory"):
        report(files[0], str(tmp_path), tmp_path / "out")
    for name in ("report.json", "report.html"):
        read = shutil.copy(files[0], tmp_path / name)
        for pair in ((read, files[1]), (files[0], read)):
            with pytest.raises(MoleError, match="is what is scored, and would be replaced"):
                report(*pair, tmp_path)


def test_a_picture_that_cannot_be_drawn_is_left_out(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreadable(reference: object) -> None:
        raise OSError("File name too long")

    monkeypatch.setattr("mole_asr.score.report.Manifest", unreadable)
    report(*files, tmp_path / "out", model="model")
    assert (tmp_path / "out" / "report.html").exists()
    assert "no picture of the routing: File name too long" in capsys.readouterr().err
