"""The tables of README.md and the picture, from results.json alone."""

from pathlib import Path

from matplotlib.figure import Figure

from mole_asr.score.charts import save_figure
from mole_asr.score.markdown import markdown_pictures, markdown_table, number, write_between_marks
from mole_asr.score.results import ResultFile, Row, macro

REFERENCE = "whisper-int8-given"
TITLES = {
    "voices13-attention": "13 languages: text decoder",
    "voices13-attention-words": "13 languages: text decoder, word lists",
    "voices13-attention-words-few": "13 languages: text decoder, word lists, few languages expected",
    "voices13-ctc": "13 languages: CTC head",
    "voices13-attention-given": "13 languages: text decoder, language given",
    "voices13-attention-given-words": "13 languages: text decoder, word lists, language given",
    "prompts5-attention": "`prompts5`: text decoder",
    "prompts5-attention-words": "`prompts5`: text decoder, word lists",
    "prompts5-attention-words-few": "`prompts5`: text decoder, word lists, few languages expected",
    "prompts5-ctc": "`prompts5`: CTC head",
    "prompts5-attention-given": "`prompts5`: text decoder, language given",
    "prompts5-attention-given-words": "`prompts5`: text decoder, word lists, language given",
    "whisper-int8-given": "Whisper base int8, language given",
    "whisper-int8-detected": "Whisper base int8, language detected",
    "whisper-float32-given": "Whisper base float32, language given",
    "whisper-float32-detected": "Whisper base float32, language detected",
}


def write_all(results: ResultFile, folder: Path) -> str:
    """Writes the tables and the picture between the marks of README.md; returns them."""
    if rows_of(results, "voices13-attention", "voices13") and rows_of(results, REFERENCE, "voices13"):
        draw(results, folder / "languages.svg")
    picture = markdown_pictures(folder, {"languages.svg": "word error rate a language over hours of training"})
    text = "\n\n".join(part for part in (main_table(results), language_table(results), picture) if part)
    write_between_marks(folder / "README.md", text)
    return text


def rows_of(results: ResultFile, system: str, test_set: str) -> dict[str, Row]:
    """Language -> row of a system on a test set."""
    return {row["language"]: row for row in results.rows if (row["system"], row["test_set"]) == (system, test_set)}


def main_table(results: ResultFile) -> str:
    """A row a system: macro error rates a test set, and their ratio to those of Whisper that is told the language."""
    sets = list(dict.fromkeys(row["test_set"] for row in results.rows if row["test_set"] != "speed"))
    header = ["system", *(f"{name}: WER / CER % (ratio), language ID %" for name in sets), "RTF", "speed-up"]
    lines = []
    peer_speed = rows_of(results, "whisper-int8-detected", "speed").get("all")
    for system, title in TITLES.items():
        cells = [title]
        for name in sets:
            rows, reference = rows_of(results, system, name), macro(rows_of(results, REFERENCE, name), "wer")
            wer = macro(rows, "wer")
            ratio = f" ({wer / reference:.2f})" if wer is not None and reference else ""
            right = number(macro(rows, "language_id_accuracy"))
            cells.append(f"{number(wer)} / {number(macro(rows, 'cer'))}{ratio}, {right}" if rows else "–")
        speed = rows_of(results, system, "speed").get("all")
        cells.append(number(speed and speed["real_time_factor"], 4))
        faster = speed and peer_speed and peer_speed["real_time_factor"] / speed["real_time_factor"]
        cells.append(f"{faster:.1f} x" if faster else "–")
        if cells[1:].count("–") < len(cells) - 1:
            lines.append(cells)
    return markdown_table(header, lines)


def language_table(results: ResultFile) -> str:
    """WER a language on the test split of voices13."""
    codes = sorted({row["language"] for row in results.rows if row["test_set"] == "voices13"} - {"all"})
    lines = [
        [title, *(number(rows[code]["wer"]) for code in codes)]
        for system, title in TITLES.items()
        if (rows := rows_of(results, system, "voices13"))
    ]
    return markdown_table(["`voices13` test, WER %", *codes], lines)


def draw(results: ResultFile, path: Path) -> None:
    """Word error rate a language over the hours that were trained on: ours, and Whisper's."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for system, marker in (("voices13-attention", "o"), ("voices13-ctc", "s"), (REFERENCE, "x")):
        rows = {code: row for code, row in rows_of(results, system, "voices13").items() if code != "all"}
        hours = [rows_of(results, "voices13-attention", "voices13")[code]["train_hours"] for code in rows]
        axes.semilogx(hours, [row["wer"] for row in rows.values()], marker, label=TITLES[system])
    for code, row in rows_of(results, "voices13-attention", "voices13").items():
        if code != "all":
            axes.annotate(code, (row["train_hours"], row["wer"]), textcoords="offset points", xytext=(4, 4))
    axes.set(xlabel="hours of training speech", ylabel="word error rate, %", ylim=(0, None))
    axes.legend()
    save_figure(figure, path)
