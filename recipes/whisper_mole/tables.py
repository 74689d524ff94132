"""The tables of README.md and the picture, from results.json alone."""

from pathlib import Path
from statistics import mean

from results import Results, Row

from mole_asr.files import atomic_path
from mole_asr.score.markdown import markdown_table, write_between_marks

REFERENCE = "whisper-int8-given"
TITLES = {
    "voices13-attention": "MoLE on Whisper base, text decoder",
    "voices13-ctc": "the same, CTC head",
    "prompts5-attention": "trained on `prompts5` alone, text decoder",
    "prompts5-ctc": "the same, CTC head",
    "whisper-int8-given": "Whisper base int8, language given",
    "whisper-int8-detected": "Whisper base int8, language detected",
    "whisper-float32-given": "Whisper base float32, language given",
    "whisper-float32-detected": "Whisper base float32, language detected",
}


def write_all(results: Results, folder: Path) -> str:
    """Writes the tables between the marks of README.md, and the picture; returns the tables."""
    text = "\n\n".join([main_table(results), language_table(results)])
    write_between_marks(folder / "README.md", text)
    if results.has("voices13-attention", "voices13") and results.has(REFERENCE, "voices13"):
        draw(results, folder / "languages.svg")
    return text


def macro(rows: dict[str, Row], key: str) -> float | None:
    """Mean over languages of a figure; None where there is none."""
    values = [row[key] for code, row in rows.items() if code != "all" and row[key] is not None]
    return mean(values) if values else None


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def main_table(results: Results) -> str:
    """A row a system: macro error rates a test set, and how many times less than Whisper that is told the language."""
    sets = list(dict.fromkeys(row["test_set"] for row in results.rows if row["test_set"] != "speed"))
    header = ["system", *(f"{name}: WER / CER % (ratio), language ID %" for name in sets), "RTF", "speed-up"]
    lines = []
    peer_speed = results.of("whisper-int8-detected", "speed").get("all")
    for system, title in TITLES.items():
        cells = [title]
        for name in sets:
            rows, reference = results.of(system, name), macro(results.of(REFERENCE, name), "wer")
            wer = macro(rows, "wer")
            ratio = f" ({wer / reference:.2f})" if wer is not None and reference else ""
            right = _number(macro(rows, "language_id_accuracy"))
            cells.append(f"{_number(wer)} / {_number(macro(rows, 'cer'))}{ratio}, {right}" if rows else "–")
        speed = results.of(system, "speed").get("all")
        cells.append(_number(speed and speed["real_time_factor"], 4))
        faster = speed and peer_speed and peer_speed["real_time_factor"] / speed["real_time_factor"]
        cells.append(f"{faster:.1f} x" if faster else "–")
        if cells[1:].count("–") < len(cells) - 1:
            lines.append(cells)
    return markdown_table(header, lines)


def language_table(results: Results) -> str:
    """WER a language on the test split of voices13."""
    codes = sorted({row["language"] for row in results.rows if row["test_set"] == "voices13"} - {"all"})
    lines = [
        [title, *(_number(rows[code]["wer"]) for code in codes)]
        for system, title in TITLES.items()
        if (rows := results.of(system, "voices13"))
    ]
    return markdown_table(["`voices13` test, WER %", *codes], lines)


def draw(results: Results, path: Path) -> None:
    """Word error rate a language over the hours that were trained on: ours, and Whisper's."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for system, marker in (("voices13-attention", "o"), ("voices13-ctc", "s"), (REFERENCE, "x")):
        rows = {code: row for code, row in results.of(system, "voices13").items() if code != "all"}
        hours = [results.of("voices13-attention", "voices13")[code]["train_hours"] for code in rows]
        axes.semilogx(hours, [row["wer"] for row in rows.values()], marker, label=TITLES[system])
    for code, row in results.of("voices13-attention", "voices13").items():
        if code != "all":
            axes.annotate(code, (row["train_hours"], row["wer"]), textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel="hours of training speech", ylabel="word error rate, %", ylim=(0, None))
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", bbox_inches="tight")
