"""Tables in Markdown, and a README that a command writes them into."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from mole_asr.files import write_text

MARKS = ("<!-- tables: written by run.py -->", "<!-- end of tables -->")

ABSENT = "–"


def mean_and_spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean of what was measured and, of several, the standard deviation: "1.2 ± 0.1"; `ABSENT` where nothing was."""
    known = [value for value in values if value is not None]
    if not known:
        return ABSENT
    return f"{mean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 else "")


def number(value: float | None, digits: int = 1) -> str:
    """A value; `ABSENT` where there is none."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share, in percent; `ABSENT` where there is none."""
    return ABSENT if share is None else f"{100 * share:.1f} %"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def markdown_pictures(folder: Path, titles: Mapping[str, str]) -> str:
    """The pictures (file name -> title) that lie in a folder, each on a line of its own."""
    return "\n\n".join(f"![{title}]({name})" for name, title in titles.items() if (folder / name).exists())


def write_between_marks(readme: Path, text: str) -> None:
    """Replaces what stands between `MARKS` in a file; one that is missing or has no marks is left alone."""
    if readme.exists() and MARKS[0] in (old := readme.read_text(encoding="utf-8")):
        body = f"{MARKS[0]}\n\n{text}\n\n{MARKS[1]}"
        begin, end = map(re.escape, MARKS)
        write_text(readme, re.sub(f"{begin}.*{end}", lambda _: body, old, flags=re.DOTALL))
