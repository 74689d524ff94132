"""The tables and the picture of README.md, from results.json alone."""

from pathlib import Path

from matplotlib.figure import Figure

from mole_asr.score.charts import save_figure
from mole_asr.score.markdown import ABSENT, markdown_pictures, markdown_table, mean_and_spread, write_between_marks
from mole_asr.score.results import ResultFile, Row, macro

PICTURE = "languages.svg"
TITLES = {
    "before": "trained on the other languages",
    "extended": "room for it, untrained",
    "grown": "trained on it alone, an expert of its own",
    "unreplayed": "the same, without replay",
    "shared": "trained on it alone, sharing the expert of {shares}",
    "pruned": "without it again",
}
Rows = dict[str, Row]


def write_tables(results: ResultFile, readme: Path) -> str:
    """Writes the tables and the picture between the marks of a README; returns them."""
    parts = [
        text for new in _new_languages(results) for text in (main_table(results, new), language_table(results, new))
    ]
    text = "\n\n".join([*parts, markdown_pictures(readme.parent, {PICTURE: "error rates before and after"})])
    write_between_marks(readme, text)
    return text


def _new_languages(results: ResultFile) -> list[str]:
    return list(dict.fromkeys(row["new"] for row in results.rows))


def runs_of(results: ResultFile, new: str, stage: str, told: bool) -> list[Rows]:
    """Language -> row, of each seed."""
    seeds = dict.fromkeys(row["seed"] for row in results.rows)
    runs = [results.select(new=new, stage=stage, told=told, seed=seed) for seed in seeds]
    return [{row["language"]: row for row in rows} for rows in runs if rows]


def old_languages(run: Rows) -> list[str]:
    """All of a run's languages but the one that was held out."""
    return [code for code in run if code not in ("all", run["all"]["new"])]


def title_of(run: Rows) -> str:
    """What was done to the model of a run, in words."""
    return TITLES[run["all"]["stage"]].format(shares=run["all"]["shares"])


def main_table(results: ResultFile, new: str) -> str:
    """A row a stage and way of transcribing: the old languages together, and the new one."""
    header = [
        f"**{new}** held out",
        "language",
        "old languages: WER / CER %",
        "language ID %",
        "texts changed",
        f"heard as {new}",
        f"{new}: WER / CER %",
        "language ID %",
        "parameters",
    ]
    lines = []
    for stage in TITLES:
        for told in (True, False):
            if runs := runs_of(results, new, stage, told):
                lines.append([title_of(runs[0]), "given" if told else "heard", *_cells(runs, new)])
    return markdown_table(header, lines)


def _cells(runs: list[Rows], new: str) -> list[str]:
    old = [old_languages(run) for run in runs]

    def of_old(key: str) -> str:
        return mean_and_spread([macro(run, key, codes) for run, codes in zip(runs, old, strict=True)])

    def of_new(key: str) -> str:
        return mean_and_spread([run[new][key] if new in run else None for run in runs])

    def counted(key: str) -> str:
        counts = [[run[code][key] for code in codes] for run, codes in zip(runs, old, strict=True)]
        whole = sum(run[code]["utterances"] for run, codes in zip(runs, old, strict=True) for code in codes)
        return f"{sum(map(sum, counts))} of {whole}"

    parameters = runs[0]["all"]["total_parameters"] / 1e6
    newcomer = f"{of_new('wer')} / {of_new('cer')}" if new in runs[0] else ABSENT
    return [
        f"{of_old('wer')} / {of_old('cer')}",
        of_old("language_id_accuracy"),
        counted("changed"),
        counted("heard_as_new"),
        newcomer,
        of_new("language_id_accuracy"),
        f"{parameters:.3f} M",
    ]


def language_table(results: ResultFile, new: str) -> str:
    """Character error rates a language, where the model hears the language by itself."""
    stages = [runs for stage in TITLES if (runs := runs_of(results, new, stage, told=False))]
    codes = [*old_languages(stages[0][0]), new]
    lines = [
        [title_of(runs[0]), *(mean_and_spread([run[code]["cer"] for run in runs]) for code in codes)] for runs in stages
    ]
    return markdown_table([f"CER %, language heard; **{new}** held out", *codes], lines)


def draw(results: ResultFile, folder: Path) -> None:
    """Draws the character error rates before and after, one chart a language that was held out."""
    if not (news := _new_languages(results)):
        return
    figure = Figure(figsize=(6.4 * len(news), 3.4), layout="constrained")
    for place, new in enumerate(news, 1):
        axes = figure.add_subplot(1, len(news), place)
        for stage, marker in (("before", "o"), ("grown", "x"), ("unreplayed", "s")):
            if not (runs := runs_of(results, new, stage, told=False)):
                continue
            codes = [*sorted(old_languages(runs[0])), new]
            rates = [sum(run[code]["cer"] for run in runs) / len(runs) for code in codes]
            axes.plot(codes, rates, marker, label=title_of(runs[0]))
        axes.set(ylabel="character error rate, %", ylim=(0, None), title=f"{new} held out, and added")
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, folder / PICTURE)
