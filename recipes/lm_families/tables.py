"""The tables of README.md, from results.json alone."""

from pathlib import Path
from statistics import mean

from plan import CONDITIONS, DENSE, EVERYWHERE, START, SYSTEMS, Condition

from mole_asr.score.markdown import (
    ABSENT,
    markdown_pictures,
    markdown_table,
    mean_and_spread,
    number,
    write_between_marks,
)
from mole_asr.score.results import ResultFile, Row

PICTURES = {
    "spread.svg": "entropy of the experts that a language uses, and purity of the experts, by layer",
    "languages.svg": "bits a byte of each language, less those of the dense model",
}
_BEFORE = "dense, before"


def write_tables(results: ResultFile, readme: Path) -> str:
    """Makes all tables and writes them into the README between its marks, with the pictures; returns them."""
    parts = [part for condition in CONDITIONS.values() for part in _condition(results, condition)]
    text = "\n\n".join(part for part in (*parts, markdown_pictures(readme.parent, PICTURES)) if part)
    write_between_marks(readme, text)
    return text


def _condition(results: ResultFile, condition: Condition) -> list[str]:
    runs = {name: runs_of(results, condition.name, name) for name in (START, *SYSTEMS)}
    runs = {name: rows for name, rows in runs.items() if rows}
    if not runs:
        return []
    return [f"### {condition.title}", _main(runs), _layers(runs)]


def runs_of(results: ResultFile, condition: str, system: str) -> list[Row]:
    """The rows of all seeds."""
    return results.select(condition=condition, system=system)


def _main(runs: dict[str, list[Row]]) -> str:
    header = ["bits a byte", "major", "minor", "all", "all − dense", "change at the start"]
    header += ["FLOPs a token", "active / total M", "training, CPU s"]
    dense = {row["seed"]: row["bits_per_byte"] for row in runs.get(DENSE, [])}
    lines = []
    for name, rows in runs.items():
        cells = [SYSTEMS[name].title if name in SYSTEMS else _BEFORE]
        cells += [mean_and_spread([row[key] for row in rows], 3) for key in ("major", "minor", "bits_per_byte")]
        differences = [row["bits_per_byte"] - dense[row["seed"]] for row in rows if row["seed"] in dense]
        mean_difference = f"{mean(differences):+.3f}" if differences and name not in (DENSE, START) else ABSENT
        shift = max((row.get("start_shift", 0.0) for row in rows), key=abs)
        cells += [mean_difference, ABSENT if name == START else f"{shift:+.5f}"]
        one = rows[0]
        cells.append(f"{mean(row['flops'] for row in rows) / 1e6:.2f} M")
        cells.append(f"{one['active_parameters'] / 1e6:.2f} / {one['total_parameters'] / 1e6:.2f}")
        cells.append(f"{mean(row['cpu_seconds'] for row in rows):.0f}")
        lines.append(cells)
    return markdown_table(header, lines)


def _layers(runs: dict[str, list[Row]]) -> str:
    """Who goes where, layer by layer, on test texts whose language nobody tells."""
    chosen = {name: rows for name, rows in runs.items() if name in EVERYWHERE or rows[0]["own_expert"]}
    places = sorted({layer["layer"] for rows in chosen.values() for row in rows for layer in row["layers"]})
    lines = []
    for name, rows in chosen.items():
        for key, title in (("language_entropy", "entropy within a language"), ("purity", "purity")):
            found = {each["layer"]: mean(row["layers"][n][key] for row in rows) for n, each in _numbered(rows[0])}
            lines.append([f"{SYSTEMS[name].title}: {title}", *(number(found.get(place), 2) for place in places)])
        if rows[0]["own_expert"]:
            own = {each["layer"]: mean(row["own_expert"][n] for row in rows) for n, each in _numbered(rows[0])}
            title = f"{SYSTEMS[name].title}: own expert among the two"
            lines.append([title, *(number(own.get(place), 2) for place in places)])
    return markdown_table(["untold", *(f"layer {place}" for place in places)], lines) if lines else ""


def _numbered(row: Row) -> list[tuple[int, Row]]:
    return list(enumerate(row["layers"]))
