"""The tables of README.md, from results.json and details.json alone.

Letters: N utterances, C columns of counts (errors and lengths of two systems).
"""

from pathlib import Path
from statistics import mean

import numpy as np
from plan import CONDITIONS, SYSTEMS, Condition
from results import Results, detail_key

from mole_asr.score.bootstrap import Difference
from mole_asr.score.groups import METRICS, Group, Macro, differences
from mole_asr.score.markdown import (
    ABSENT,
    markdown_pictures,
    markdown_table,
    mean_and_spread,
    write_between_marks,
)
from mole_asr.score.results import Row, macro

RIVALS = {"dense": "dense", "lr-moe": "LR-MoE"}
PICTURES = {
    "wer_by_hours.svg": "WER of each language over its hours of training",
    "reliability.svg": "r of MoLE where the language was right and wrong",
    "experts.svg": "what each expert computes",
    "gradients.svg": "norms of the gradients of MoLE's experts over the training",
}


def write_tables(results: Results, readme: Path) -> str:
    """Makes all tables, and writes them into the README between its marks where it has them, with the pictures.

    Returns:
        What it writes, as Markdown.
    """
    parts = [part for name in CONDITIONS for part in _condition(results, CONDITIONS[name])]
    parts.append(markdown_pictures(readme.parent, PICTURES))
    text = "\n\n".join(part for part in parts if part)
    write_between_marks(readme, text)
    return text


def _condition(results: Results, condition: Condition) -> list[str]:
    systems = [name for name in SYSTEMS if results.select(system=name, condition=condition.name, test_set="test")]
    if not systems:
        return []
    epochs = sorted({str(row["epochs"]) for row in results.select(condition=condition.name)})
    title = f"### `{condition.name}`: {condition.title} ({' or '.join(epochs)} epochs)"
    parts = [title, *(table(results, condition, systems) for table in (_main, _differences, _by_language))]
    others = [test.name for test in condition.tests if results.select(condition=condition.name, test_set=test.name)]
    if others != ["test"]:
        parts.append(_other_tests(results, condition, systems, [name for name in others if name != "test"]))
    return parts


def runs_of(results: Results, system: str, condition: str, test_set: str) -> dict[int, dict[str, Row]]:
    """Seed -> language (or "all") -> row."""
    found: dict[int, dict[str, Row]] = {}
    for row in results.select(system=system, condition=condition, test_set=test_set):
        found.setdefault(row["seed"], {})[row["language"]] = row
    return dict(sorted(found.items()))


def _main(results: Results, condition: Condition, systems: list[str]) -> str:
    header = ["system", "active / total M", "WER %", "CER %"]
    header += ["low-resource WER %", "low-resource CER %"] if condition.low else []
    header += ["language ID %", "ECE of r", "wrong script %", "train min", "RTF", "seeds"]
    lines = []
    for system in systems:
        runs = runs_of(results, system, condition.name, "test").values()
        all_rows = [rows["all"] for rows in runs]
        one = all_rows[0]
        cells = [SYSTEMS[system].title, f"{one['active_parameters'] / 1e6:.2f} / {one['total_parameters'] / 1e6:.2f}"]
        cells += [mean_and_spread([macro(rows, key) for rows in runs]) for key in ("wer", "cer")]
        if condition.low:
            cells += [mean_and_spread([macro(rows, key, condition.low) for rows in runs]) for key in ("wer", "cer")]
        cells.append(mean_and_spread([macro(rows, "language_id_accuracy") for rows in runs]))
        cells.append(mean_and_spread([row["ece"] for row in all_rows], 3))
        cells.append(mean_and_spread([100 * (row["wrong_script_share"] or 0) for row in all_rows], 2))
        cells.append(mean_and_spread([row["train_seconds"] / 60 for row in all_rows]))
        cells += [f"{mean(row['real_time_factor'] for row in all_rows):.4f}", str(len(all_rows))]
        lines.append(cells)
    return markdown_table(header, lines)


def _differences(results: Results, condition: Condition, systems: list[str]) -> str:
    header = ["macro, points", *(f"{metric.upper()} − {title}" for metric in METRICS for title in RIVALS.values())]
    lines = []
    for system in systems:
        found = [compare(results, condition.name, system, rival) for rival in RIVALS]
        cells = [ABSENT if each is None else _points(each[metric]) for metric in METRICS for each in found]
        lines.append([SYSTEMS[system].title, *cells])
    return markdown_table(header, lines)


def _by_language(results: Results, condition: Condition, systems: list[str]) -> str:
    runs = {system: runs_of(results, system, condition.name, "test") for system in systems}
    first = next(iter(next(iter(runs.values())).values()))
    hours = {code: row["train_hours"] for code, row in first.items() if code != "all"}
    codes = sorted(hours, key=lambda code: -hours[code])
    lines = []
    for system, seeds in runs.items():
        cells = [
            " / ".join(
                mean_and_spread([rows[code][key] for rows in seeds.values()]).partition(" ")[0]
                for key in ("wer", "cer")
            )
            for code in codes
        ]
        lines.append([SYSTEMS[system].title, *cells])
    return markdown_table(["WER / CER %", *(f"{code} ({hours[code]:.2f} h)" for code in codes)], lines)


def _other_tests(results: Results, condition: Condition, systems: list[str], tests: list[str]) -> str:
    lines = []
    for system in systems:
        cells = [SYSTEMS[system].title]
        for test in tests:
            runs = runs_of(results, system, condition.name, test).values()
            wer, cer, right = (
                mean_and_spread([macro(rows, key) for rows in runs]) for key in ("wer", "cer", "language_id_accuracy")
            )
            all_rows = [rows["all"] for rows in runs]
            means = [
                mean_and_spread([row[f"reliability_{which}"] for row in all_rows], 2) for which in ("right", "wrong")
            ]
            cells += [f"{wer} / {cer}", right, mean_and_spread([row["ece"] for row in all_rows], 3), " / ".join(means)]
        lines.append(cells)
    names = [
        name for test in tests for name in (f"{test}: WER / CER %", "language ID %", "ECE of r", "r right / wrong")
    ]
    return markdown_table(["macro", *names], lines)


def compare(results: Results, condition: str, system: str, rival: str) -> dict[str, Difference] | None:
    """Macro WER and CER of a system on the test split minus a rival's, by paired bootstrap over utterances.

    The errors of the seeds that both have are added up, an utterance; so the interval is about other test utterances
    and says nothing about other seeds.

    Returns:
        By metric, "wer" and "cer"; None for the rival itself, or where they have no seed in common.
    """
    seeds = sorted(set(runs_of(results, system, condition, "test")) & set(runs_of(results, rival, condition, "test")))
    utterances = results.test_sets.get(f"{CONDITIONS[condition].corpus}-test")
    if system == rival or not seeds or utterances is None:
        return None
    columns = []
    for name in (system, rival):
        runs = [results.details[detail_key(name, condition, seed, "test")] for seed in seeds]
        for errors, lengths in (("word_errors", "words"), ("character_errors", "characters")):
            columns.append(np.sum([run[errors] for run in runs], axis=0))
            columns.append(len(seeds) * np.array(utterances[lengths]))
    counts_NC, languages_N = np.stack(columns, axis=1), np.array(utterances["languages"])
    groups = [
        Group(code, [], counts_NC[languages_N == number], seed=0) for number, code in enumerate(utterances["codes"])
    ]
    return differences(Macro(groups))


def _points(found: Difference) -> str:
    low, high = found.interval
    return f"{found.value:+.1f} [{low:+.1f}, {high:+.1f}]"
