from pathlib import Path

from mole_asr.score.markdown import MARKS, markdown_pictures, markdown_table, write_between_marks


def test_a_table_has_a_row_a_line() -> None:
    text = markdown_table(["a", "b"], [["x", "1"], ["y", "2"]])
    assert text.splitlines() == ["| a | b |", "| --- | --: |", "| x | 1 |", "| y | 2 |"]


def test_only_pictures_that_are_there_are_shown(tmp_path: Path) -> None:
    (tmp_path / "b.svg").touch()
    assert markdown_pictures(tmp_path, {"a.svg": "A", "b.svg": "B"}) == "![B](b.svg)"


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{MARKS[0]}\nold \\1\n{MARKS[1]}\ntail\n", encoding="utf-8")
    for _ in range(2):
        write_between_marks(readme, "new \\1")
        assert readme.read_text(encoding="utf-8") == f"head\n{MARKS[0]}\n\nnew \\1\n\n{MARKS[1]}\ntail\n"
    readme.write_text("no marks", encoding="utf-8")
    write_between_marks(readme, "new")
    assert readme.read_text(encoding="utf-8") == "no marks"
    write_between_marks(tmp_path / "none.md", "new")
    assert not (tmp_path / "none.md").exists()
