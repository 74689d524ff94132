"""Word and character error rates of a hypothesis file, with intervals, by language or speaker."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mole_asr.arguments import check_seed
from mole_asr.corpus.languages import check_language
from mole_asr.errors import MoleError
from mole_asr.files import write_text
from mole_asr.score.bootstrap import RESAMPLES, Difference
from mole_asr.score.groups import WORDS, Group, GroupScore, Macro, count_errors, differences, make_groups
from mole_asr.score.pairs import Pair, check_keeps, pair, read_sentences

UNITS = {
    "wer": "percent",
    "cer": "percent; characters are code points, and spaces count",
    "interval": "95 % bootstrap over utterances",
    "language_id_accuracy": "percent",
    "reliability": "0 to 1",
    "ece": "0 to 1",
    "difference": "percentage points; negative is better than `against`",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """This system minus the one `against`, by paired bootstrap; the keys are `wer` and `cer`."""

    against: str
    pooled: dict[str, Difference]
    macro: dict[str, Difference]
    missing: list[str]


@dataclass(frozen=True)
class ScoreReport:
    """What `score` found. `str(report)` is the table for the terminal, `to_dict()` the content of the JSON file.

    `macro` is the mean over languages, `pooled` sums errors and lengths over all utterances; `missing` names the
    references without a hypothesis, which count as deletions. `pairs` and `counts_N4` (word errors, words, character
    errors, characters) are the utterances themselves.
    """

    reference: str
    hypothesis: str
    by: Literal["language", "speaker"] | None
    seed: int
    pooled: GroupScore
    macro: GroupScore
    languages: dict[str, GroupScore]
    speakers: dict[str, GroupScore]
    missing: list[str]
    comparison: Comparison | None
    pairs: list[Pair] = field(repr=False)
    counts_N4: np.ndarray = field(repr=False)
    seconds: float | None = None

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of work a second of audio, where both are known."""
        return self.seconds / (self.pooled.hours * 3600) if self.seconds is not None and self.pooled.hours else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the utterances, ready for JSON; `units` says what the numbers are in."""
        return {
            "reference": self.reference,
            "hypothesis": self.hypothesis,
            "seed": self.seed,
            "resamples": RESAMPLES,
            "units": UNITS,
            "seconds": self.seconds,
            "real_time_factor": self.real_time_factor,
            "hours": self.pooled.hours,
            "ece": self.pooled.ece,
            "macro": asdict(self.macro),
            "pooled": asdict(self.pooled),
            "languages": {name: asdict(group) for name, group in self.languages.items()},
            "speakers": {name: asdict(group) for name, group in self.speakers.items()},
            "missing": self.missing,
            "comparison": asdict(self.comparison) if self.comparison else None,
        }

    def __str__(self) -> str:
        from mole_asr.score.tables import text_table

        return text_table(self)

    def write(self, path: str | Path) -> None:
        """Writes the figures as JSON, or as one self-contained page where the name ends in `.html`."""
        if Path(path).suffix == ".html":
            from mole_asr.score.page import page

            write_text(path, page(self))
        else:
            write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


def score(
    reference: str | Path,
    hypothesis: str | Path,
    *,
    by: Literal["language", "speaker"] | None = None,
    against: str | Path | None = None,
    language: str | None = None,
    fold_accents: Sequence[str] = (),
    output: str | Path | None = None,
    seed: int = 0,
) -> ScoreReport:
    """Scores hypotheses against references.

    Both texts are normalised in the reference's language: lower case, no punctuation, digits spelled out, combining
    marks kept. Rates are sums of errors over sums of reference lengths, in percent. Characters are Unicode code
    points, and spaces count as characters. Intervals are 95 % bootstrap intervals over utterances. A reference
    without a hypothesis counts as deletions and is reported.

    Args:
        reference: a manifest (JSONL) or plain text (`id<TAB>text`, or one sentence a line).
        hypothesis: transcripts or a manifest (JSONL), or plain text like the reference's.
        by: a row a language or a row a speaker in the table.
        against: another system's hypotheses, compared with these by paired bootstrap.
        language: language of references that name none.
        fold_accents: languages to score without accents.
        output: also write the result there: `.json` or `.html`.
        seed: of the bootstrap.

    Raises:
        MoleError: a file is missing, malformed or does not fit the others, `output` has another suffix or is one of
            them, or a language is no code.
    """
    if output is not None and Path(output).suffix not in (".json", ".html"):
        raise MoleError(f"output {output}: the name must end in .json or .html")
    if output is not None:
        check_keeps(output, (reference, hypothesis, against))
    check_seed(seed)
    for code in (*fold_accents, *([] if language is None else [language])):
        check_language(code)
    references = read_sentences(reference)
    pairs, missing = pair(references, read_sentences(hypothesis), language, fold_accents)
    counts_NC = counts_N4 = count_errors(pairs)
    other_missing: list[str] = []
    if against is not None:
        others, other_missing = pair(references, read_sentences(against), language, fold_accents)
        counts_NC = np.concatenate([counts_N4, count_errors(others)], axis=1)
    pooled = Group("", pairs, counts_NC, seed)
    by_language = make_groups(pairs, counts_NC, seed, lambda pair: pair.language)
    by_speaker = make_groups(pairs, counts_NC, seed, lambda pair: pair.speaker or "unknown") if by == "speaker" else {}
    macro = Macro(list(by_language.values()))
    comparison = None
    if against is not None:
        if not pooled.sums_C[WORDS]:
            raise MoleError(f"{reference} holds no words: there is nothing to compare")
        comparison = Comparison(str(against), differences(pooled), differences(macro), other_missing)
    result = ScoreReport(
        reference=str(reference),
        hypothesis=str(hypothesis),
        by=by,
        seed=seed,
        pooled=pooled.score(),
        macro=macro.score(),
        languages={name: group.score() for name, group in by_language.items()},
        speakers={name: group.score() for name, group in by_speaker.items()},
        missing=missing,
        comparison=comparison,
        pairs=pairs,
        counts_N4=counts_N4,
    )
    if output is not None:
        result.write(output)
    return result
