"""The report of a run: figures as JSON, and a page with tables, training curves, routing and the worst utterances."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mole_asr.files import write_text
from mole_asr.score.charts import read_curves, read_routing
from mole_asr.score.page import page
from mole_asr.score.score import ScoreReport, score


def report(
    reference: str | Path,
    hypothesis: str | Path,
    output: str | Path,
    *,
    logs: str | Path | None = None,
    routing: str | Path | None = None,
    seconds: float | None = None,
    fold_accents: Sequence[str] = (),
    seed: int = 0,
) -> ScoreReport:
    """Scores hypotheses by language and writes `report.json` and `report.html` into the folder `output`.

    Rates are in percent; the key `units` of the JSON file says so for each.

    Args:
        reference: a manifest (JSONL) or plain text, as for `score`.
        hypothesis: transcripts (JSONL) or plain text, as for `score`.
        output: a folder; made if missing.
        logs: Lightning's CSV logs (`metrics.csv`, or a folder that holds some) for the training curves.
        routing: a JSON object with the language posteriors of one utterance: `id`, `text`, `languages` [N],
            `frame_shift_s`, `evidence` [frames][N], `reliability`.
        seconds: wall-clock time of the transcription, for the real-time factor.
        fold_accents: languages to score without accents.
        seed: of the bootstrap.

    Raises:
        MoleError: a file is missing, malformed or does not fit the others.
    """
    curves = read_curves(logs) if logs is not None else None
    picture = read_routing(routing) if routing is not None else None
    result = replace(score(reference, hypothesis, by="language", fold_accents=fold_accents, seed=seed), seconds=seconds)
    result.write(Path(output) / "report.json")
    write_text(Path(output) / "report.html", page(result, curves, picture))
    return result
