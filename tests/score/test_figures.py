"""The figures of a small score, worked out by hand."""

import json
from pathlib import Path

import pytest

from mole_asr.score.figures import language_rows
from mole_asr.score.score import score


def test_rows_are_those_of_each_language_and_of_all_together(tmp_path: Path) -> None:
    said = [("a", "one two three four", "en"), ("b", "five", "en"), ("c", "да", "ru"), ("d", "нет да", "ru")]
    heard = [("a", "one two three for", "en", 0.9), ("b", "five", "ru", 0.6), ("c", "da", "ru", 1.0)]
    lines = [json.dumps({"id": i, "text": text, "language": code}) for i, text, code in said]
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"id": i, "text": t, "language": code, "reliability": r}) for i, t, code, r in heard]
    (tmp_path / "heard.jsonl").write_text("\n".join(lines))
    rows = {row["language"]: row for row in language_rows(score(tmp_path / "said.jsonl", tmp_path / "heard.jsonl"))}
    assert list(rows) == ["en", "ru", "all"]
    english, russian, together = rows.values()
    # English: a word of five, a letter of 22 ("one two three four" has 18 characters); one language of two found.
    assert (english["words"], english["word_errors"], english["wer"]) == (5, 1, 20.0)
    assert english["cer"] == pytest.approx(100 / 22, abs=1e-3)
    assert (english["language_id_accuracy"], english["reliability_right"], english["reliability_wrong"]) == (
        50,
        0.9,
        0.6,
    )
    assert english["ece"] == pytest.approx((0.1 + 0.6) / 2)
    assert english["wrong_script_share"] == 0
    # Russian: "da" is wrong in a script that is wrong, and what was not heard at all is missing.
    assert (russian["words"], russian["word_errors"], russian["wer"], russian["cer"]) == (3, 3, 100.0, 100.0)
    assert (russian["language_id_accuracy"], russian["reliability_wrong"], russian["wrong_script_share"]) == (
        100,
        None,
        1,
    )
    assert (together["words"], together["wer"]) == (8, 50.0)
    assert together["language_id_accuracy"] == pytest.approx(200 / 3, abs=0.01)
    assert together["ece"] == pytest.approx((0.1 + 0.6) / 3, abs=1e-4)


def test_what_transcripts_do_not_say_is_none(tmp_path: Path) -> None:
    (tmp_path / "said.jsonl").write_text(json.dumps({"id": "a", "text": "one", "language": "en"}))
    (tmp_path / "heard.jsonl").write_text(json.dumps({"id": "a", "text": ""}))
    row = language_rows(score(tmp_path / "said.jsonl", tmp_path / "heard.jsonl"))[0]
    unknown = {"language_id_accuracy", "ece", "reliability_right", "reliability_wrong", "wrong_script_share"}
    assert {name for name, value in row.items() if value is None} == unknown
