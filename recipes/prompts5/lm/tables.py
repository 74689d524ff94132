"""The tables of README.md, from results.json alone."""

from pathlib import Path

from systems import SYSTEMS
from texts import KINDS

from mole_asr.score.markdown import markdown_table, write_between_marks
from mole_asr.score.results import ResultFile, Row, macro


def write_all(results: ResultFile, readme: Path) -> str:
    """Writes the tables between the marks of a README; returns them."""
    parts = (system_table(results), language_table(results), text_table(results))
    text = "\n\n".join(part for part in parts if part)
    write_between_marks(readme, text)
    return text


def rows_of(results: ResultFile, system: str, split: str) -> dict[str, Row]:
    """Language -> row."""
    return {row["language"]: row for row in results.select(system=system, split=split)}


def system_table(results: ResultFile) -> str:
    """A row a system: weights, macro error rates, the difference to the n-grams alone, and what it costs."""
    header = ["", "weights: n-grams, model, bonus", "dev WER %", "test WER %", "test CER %"]
    header += ["WER against n-grams alone [95 %]", "CPU s a second"]
    lines = []
    for name, system in SYSTEMS.items():
        dev, test = rows_of(results, name, "dev"), rows_of(results, name, "test")
        if dev and test:
            row = test["all"]
            weights = "–" if name == "greedy" else f"{row['ngram']:g}, {row['lm']:g}, {row['bonus']:g}"
            rates = [f"{macro(part, key):.1f}" for part, key in ((dev, "wer"), (test, "wer"), (test, "cer"))]
            compared = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row["wer_difference"]) if row["wer_difference"] else "–"
            lines.append([system.title, weights, *rates, compared, f"{row['cpu_s_per_s']:.3f}"])
    return markdown_table(header, lines) if lines else ""


def language_table(results: ResultFile) -> str:
    """WER / CER a language on the test split."""
    found = {name: rows for name in SYSTEMS if (rows := rows_of(results, name, "test"))}
    codes = sorted({code for rows in found.values() for code in rows} - {"all"})
    lines = [
        [SYSTEMS[name].title, *(f"{rows[code]['wer']:.1f} / {rows[code]['cer']:.1f}" for code in codes)]
        for name, rows in found.items()
    ]
    return markdown_table(["test, WER / CER %", *codes], lines) if lines else ""


def text_table(results: ResultFile) -> str:
    """What the language model was trained on, and how well it knows the test sentences."""
    texts, bits = rows_of(results, "texts", "train"), rows_of(results, "bits", "test")
    if not texts:
        return ""
    names = {"prompts": "training prompts", "texts": "other sentences", **dict(zip(KINDS, LEFT_OUT, strict=True))}
    lines = [[title, *(str(row[name]) for row in texts.values())] for name, title in names.items()]
    for name, title in (("ngram_bits", "bits a letter of test, n-grams"), ("lm_bits", "the same, language model")):
        if bits:
            lines.append([title, *(f"{bits[code][name]:.2f}" for code in texts)])
    return markdown_table(["texts", *texts], lines)


LEFT_OUT = (
    "left out: a dev or test sentence",
    "left out: holds one of four words or more",
    "left out: letters that the recogniser lacks",
)
