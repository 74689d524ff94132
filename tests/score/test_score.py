import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mole_asr
from mole_asr.errors import MoleError
from mole_asr.score.groups import count_errors
from mole_asr.score.pairs import Pair
from mole_asr.score.score import score


def jsonl(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    reference = jsonl(
        tmp_path / "ref.jsonl",
        {"id": "1", "text": "one two three", "language": "en", "speaker": "ann", "duration_s": 1800},
        {"id": "2", "text": "four", "language": "en", "speaker": "bob", "duration_s": 1800},
        {"id": "3", "text": "un deux", "language": "fr", "speaker": "ann", "duration_s": 3600},
    )
    hypothesis = jsonl(
        tmp_path / "hyp.jsonl",
        {"id": "1", "text": "One too three!", "language": "en", "reliability": 0.9},
        {"id": "2", "text": "four four", "language": "fr", "reliability": 0.3},
        {"id": "3", "text": "un", "language": "fr", "reliability": 0.8},
    )
    return reference, hypothesis


def edit_distance(a: list, b: list) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


texts = st.lists(st.sampled_from(["a", "ab", "né", "हि", "я"]), max_size=6).map(" ".join)


@settings(deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_counts_agree_with_plain_edit_distance(both: list[tuple[str, str]]) -> None:
    counts = count_errors([Pair("x", said, heard, "en") for said, heard in both])
    for row, (said, heard) in zip(counts, both, strict=True):
        expected = [edit_distance(said.split(), heard.split()), len(said.split())]
        assert row.tolist() == [*expected, edit_distance(list(said), list(heard)), len(said)]


def test_rates_by_hand(files: tuple[Path, Path]) -> None:
    report = score(*files)
    assert report.languages["en"].wer == pytest.approx(100 * 2 / 4)
    assert report.languages["fr"].wer == pytest.approx(100 * 1 / 2)
    assert report.languages["en"].cer == pytest.approx(100 * 6 / 17)  # w -> o; and " four", its space too
    assert report.languages["fr"].cer == pytest.approx(100 * 5 / 7)
    assert report.macro.cer == pytest.approx(100 * (6 / 17 + 5 / 7) / 2)
    assert report.pooled.cer == pytest.approx(100 * 11 / 24)
    assert (report.pooled.utterances, report.pooled.hours, report.languages["en"].hours) == (3, 2, 1)
    assert report.languages["en"].language_id_accuracy == 50
    assert report.languages["en"].reliability_wrong == pytest.approx(0.3)


def test_by_speaker(files: tuple[Path, Path]) -> None:
    report = score(*files, by="speaker")
    assert report.speakers["ann"].wer == pytest.approx(100 * 2 / 5)
    assert report.speakers["bob"].wer == 100
    assert str(report).splitlines()[1].startswith("ann")


def test_a_missing_hypothesis_is_all_deletions(files: tuple[Path, Path], tmp_path: Path) -> None:
    report = score(files[0], jsonl(tmp_path / "few.jsonl", {"id": "1", "text": "one two three"}))
    assert report.languages["fr"].wer == report.languages["fr"].cer == 100
    assert report.missing == ["2", "3"]
    assert "lacks 2 of 3 utterances, counted as deletions: 2, 3" in str(report)
    assert report.pooled.language_id_accuracy is None and "language ID" not in str(report)


def test_empty_references(tmp_path: Path) -> None:
    reference = jsonl(tmp_path / "r.jsonl", {"id": "1", "text": "", "language": "en"})
    hypothesis = jsonl(tmp_path / "h.jsonl", {"id": "1", "text": "thank you"})
    report = score(reference, hypothesis, by="language")
    assert (report.pooled.wer, report.pooled.wer_interval, report.macro.cer) == (None, None, None)
    assert report.counts_N4.tolist() == [[2, 0, 9, 0]]
    assert "en" in str(report) and "None" not in str(report) and "nan" not in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_an_empty_reference_adds_insertions_to_the_others(tmp_path: Path) -> None:
    reference = jsonl(tmp_path / "r.jsonl", {"id": "1", "text": ""}, {"id": "2", "text": "a b c d"})
    hypothesis = jsonl(tmp_path / "h.jsonl", {"id": "1", "text": "x"}, {"id": "2", "text": "a b c d"})
    assert score(reference, hypothesis).pooled.wer == 25


def test_against_itself_and_a_worse_system(files: tuple[Path, Path], tmp_path: Path) -> None:
    same = score(*files, against=files[1]).comparison
    assert same and same.pooled["wer"].value == same.macro["cer"].value == 0 and same.pooled["cer"].p_value == 1
    worse = jsonl(tmp_path / "worse.jsonl", *({"id": id, "text": "nothing"} for id in "123"))
    report = score(*files, against=worse)
    assert report.comparison and report.comparison.pooled["wer"].value == pytest.approx(50 - 100 * 6 / 6)
    assert "WER (macro): -" in str(report)
    assert report.pooled == score(*files).pooled  # the other system changes nothing in ours


def test_the_seed_decides(files: tuple[Path, Path]) -> None:
    assert score(*files, seed=3).to_dict() == score(*files, seed=3).to_dict()
    assert score(*files, seed=3).macro.wer == score(*files, seed=4).macro.wer


def test_plain_text_by_line(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("Guten Tag\nAdieu\n")
    (tmp_path / "h.txt").write_text("guten tag\n\n")
    report = score(tmp_path / "r.txt", tmp_path / "h.txt", language="de")
    assert list(report.languages) == ["de"] and report.pooled.wer == pytest.approx(100 / 3)
    assert "hours" not in str(report)
    with pytest.raises(MoleError, match="German"):
        score(tmp_path / "r.txt", tmp_path / "h.txt", language="German")
    with pytest.raises(MoleError, match="French"):
        score(tmp_path / "r.txt", tmp_path / "h.txt", fold_accents=["French"])


def test_output_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    report = score(*files, output=tmp_path / "deep" / "x.json")
    written = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert written["macro"]["wer"] == report.macro.wer and written["units"]["wer"] == "percent"
    score(*files, output=tmp_path / "x.html")
    assert "<table>" in (tmp_path / "x.html").read_text()
    with pytest.raises(MoleError, match="must end in"):
        score(*files, output=tmp_path / "x.csv")
    taken = tmp_path / "taken.json"
    taken.write_bytes(files[1].read_bytes())
    with pytest.raises(MoleError, match=r"taken\.json: is what is scored, and would be replaced"):
        score(files[0], taken, output=tmp_path / "." / "taken.json")
    assert taken.read_bytes() == files[1].read_bytes()


def test_the_package_can_be_called_under_its_public_name(files: tuple[Path, Path]) -> None:
    first = mole_asr.score(*files)  # the lazy function or, once imported, the package of the same name
    assert mole_asr.score(*files).to_dict() == first.to_dict()


def test_scoring_imports_no_torch_nor_pictures(files: tuple[Path, Path]) -> None:
    code = (
        "import sys; from mole_asr.score.score import score; print(score(*sys.argv[1:])); "
        "print([name for name in ('torch', 'lhotse', 'lightning', 'matplotlib', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_intervals_hold_the_rate_on_a_larger_set(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    said = [{"id": str(i), "text": "a b c d e", "language": "en" if i % 2 else "fr"} for i in range(60)]
    heard = [
        {"id": line["id"], "text": " ".join(w if generator.random() > 0.2 else "x" for w in "abcde")} for line in said
    ]
    files = jsonl(tmp_path / "r.jsonl", *said), jsonl(tmp_path / "h.jsonl", *heard)
    report = score(*files)
    assert score(*files, seed=1).pooled.wer_interval != report.pooled.wer_interval
    for group in (report.macro, report.pooled, *report.languages.values()):
        assert group.wer is not None and group.wer_interval is not None
        assert group.wer_interval[0] < group.wer < group.wer_interval[1]
