"""The thirteen-language corpus: twelve hours of real speech, from English (3.9 h) down to Danish (four minutes).

Prompts, two spoken adventure games, a puzzle game, sentences read for a synthesizer, and names of pictures: six
sources, one module each, which say where texts and recordings come from and under which licence. Every package is
Debian's.

`voices13_splits.tsv` names every utterance that is used, its speaker and its split; nothing else is used for anything.
Texts that repeat in a source stay in one split; across sources, three utterances of the test split (`six`, `why`, `it's
locked`) and one of the split `unseen` (`dièse`) say what is trained on. The Spanish, French and Russian volunteers of
Tux Paint are the split `unseen`: they are never trained on, to measure how a model does with new speakers. Left out of
the table were clips whose text and recording differ, as far as letters a second show it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from mole_asr.corpus.manifest import Manifest, Utterance
from mole_asr.data_prep import debian, drascula, festvox_ru, fillets, prompts, queen, tuxpaint
from mole_asr.data_prep.clips import Clip, store
from mole_asr.data_prep.output import (
    audio_since,
    code_recipe,
    is_done,
    manifest_path,
    print_left_out,
    write_corpus,
)
from mole_asr.files import check_folder

SPLITS = ("train", "dev", "test", "unseen")
SOURCES: dict[str, ModuleType] = {
    "prompts": prompts,
    "queen": queen,
    "drascula": drascula,
    "fillets": fillets,
    "festvox-ru": festvox_ru,
    "tuxpaint": tuxpaint,
}

_Table = Mapping[tuple[str, str, str], tuple[str, str]]


def prepare(output: str | Path, source: str | Path | None = None) -> None:
    """Fetches the thirteen-language corpus (650 MB of packages) and writes its manifests.

    Writes `cuts_train.jsonl`, `cuts_dev.jsonl`, `cuts_test.jsonl`, `cuts_unseen.jsonl`, the decoded audio (`audio/`,
    1.5 GB), the fetched packages (`packages/`) and the list of what was left out (`left_out.tsv`). A second run does
    only what is missing.

    Args:
        output: folder to write.
        source: folder with the .deb files, where they are already fetched; they are then read in place.

    Raises:
        MoleError: packages that cannot be had, or a package with a wrong checksum.
    """
    output = Path(output)
    check_folder(output)
    table = split_table()
    recipe = _recipe()
    if not is_done(output, recipe, SPLITS):
        folder = Path(source) if source is not None else output / "packages"
        sums = {name: sum_ for module in SOURCES.values() for name, sum_ in module.PACKAGES.items()}
        if source is None:
            debian.fetch(sums, folder)
        packages = debian.verified(sums, folder)
        since = audio_since(output, recipe)
        utterances: dict[str, list[Utterance]] = {split: [] for split in SPLITS}
        left_out: list[tuple[str, str, str]] = []
        for name, module in SOURCES.items():
            print(f"{name}: unpacking and decoding ...", flush=True)
            _prepare_source(name, module.clips(packages), table, output, since, utterances, left_out)
        write_corpus(output, utterances, left_out, recipe)
    for name, module in SOURCES.items():
        print(f"licence of {name}: {module.LICENCE}")
    print_left_out(output)
    print(summary(output, table))


def split_table() -> _Table:
    """Returns (source, language, key) -> (speaker, split) of every utterance that is used."""
    lines = files("mole_asr.data_prep").joinpath("voices13_splits.tsv").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines[1:])
    return {(source, language, key): (speaker, split) for source, language, speaker, key, split in rows}


def summary(output: str | Path, table: _Table) -> str:
    """Returns a table of the corpus in `output`: utterances and hours, beside what the split table has.

    Args:
        output: folder that `prepare` wrote.
        table: as from `split_table`.

    Returns:
        A line for each source, language and split; those whose number of utterances is not the expected one are marked.
    """
    expected = Counter((source, language, split) for (source, language, _), (_, split) in table.items())
    found: Counter[tuple[str, str, str]] = Counter()
    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    for split in SPLITS:
        for utterance in Manifest(manifest_path(output, split)):
            source = next(name for name in SOURCES if utterance.id.startswith(f"{name}-{utterance.language}-"))
            found[source, utterance.language, split] += 1
            seconds[source, utterance.language, split] += utterance.duration_s
    lines = [f"{'source':11}{'language':9}{'split':7}{'utterances':>11}{'expected':>9}{'hours':>7}"]
    for place in sorted(expected | found, key=lambda place: (*place[:2], SPLITS.index(place[2]))):
        mark = "" if found[place] == expected[place] else "  <- differs"
        counts = f"{found[place]:11d}{expected[place]:9d}{seconds[place] / 3600:7.2f}"
        lines.append(f"{place[0]:11}{place[1]:9}{place[2]:7}{counts}{mark}")
    lines.append(f"{'all':27}{found.total():11d}{expected.total():9d}{sum(seconds.values()) / 3600:7.2f}")
    return "\n".join(lines)


def _prepare_source(
    source: str,
    clips: Iterable[Clip],
    table: _Table,
    output: Path,
    since: float,
    utterances: Mapping[str, list[Utterance]],
    left_out: list[tuple[str, str, str]],
) -> None:
    """Adds the utterances of a source to `utterances` and what is left out of it to `left_out`."""
    missing = {place for place in table if place[0] == source}
    for clip in clips:
        place = (source, clip.language, clip.key)
        if place not in table:
            left_out.append((clip.language, f"{source}: {clip.key}", "not in the split table"))
        elif not clip.spoken:
            left_out.append((clip.language, f"{source}: {clip.key}", "in the split table, but without a text"))
        else:
            name = clip.key.replace("/", "_")
            path = output.absolute() / "audio" / source / clip.language / f"{name}.wav"
            utterance = store(clip, path, f"{source}-{clip.language}-{name}", since)
            speaker, split = table[place]
            utterances[split].append(replace(utterance, speaker=speaker))
        missing.discard(place)
    left_out.extend(
        (language, f"{source}: {key}", "in the split table, but no recording") for _, language, key in sorted(missing)
    )


def _recipe() -> str:
    """What the outcome depends on: the code of this module and of the sources', and the tables."""
    code: list[str | Path] = [__file__]
    code.extend(str(module.__file__) for module in SOURCES.values())
    folder = Path(__file__).parent
    return code_recipe({}, *code, folder / "voices13_splits.tsv", folder / "prompts_groups.tsv")
