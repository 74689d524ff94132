"""The report of a run: figures as JSON, and a page with tables, training curves, routing and the worst utterances."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mole_asr.asr.routing import Routing, hear_languages
from mole_asr.corpus.manifest import Manifest
from mole_asr.errors import MoleError
from mole_asr.files import check_folder, write_text
from mole_asr.score.charts import read_curves
from mole_asr.score.page import page
from mole_asr.score.pairs import check_keeps
from mole_asr.score.score import ScoreReport, score

LONGEST_PICTURE_S = 8.0


def report(
    reference: str | Path,
    hypothesis: str | Path,
    output: str | Path,
    *,
    logs: str | Path | None = None,
    model: str | Path | None = None,
    seconds: float | None = None,
    fold_accents: Sequence[str] = (),
    seed: int = 0,
) -> ScoreReport:
    """Scores hypotheses by language and writes `report.json` and `report.html` into the folder `output`.

    Rates are in percent; the key `units` of the JSON file says so for each. Where `transcribe` has left a file
    `x.stats.json` beside the hypotheses `x.jsonl`, its figures go into `report.json` too: the real-time factor, and its
    `seconds` under the name `transcribe_seconds`.

    Args:
        reference: a manifest (JSONL) or plain text, as for `score`.
        hypothesis: transcripts (JSONL) or plain text, as for `score`.
        output: a folder; made if missing.
        logs: Lightning's CSV logs (`metrics.csv`, or a folder that holds some) for the training curves.
        model: folder of the trained model, for a picture of the routing of one utterance; the reference must be a
            manifest then. If it cannot be drawn, the page is written without it.
        seconds: wall-clock time of the whole recipe; goes into `report.json` as it is.
        fold_accents: languages to score without accents.
        seed: of the bootstrap.

    Raises:
        MoleError: a file is missing, malformed, does not fit the others or would be replaced, or the folder cannot be
            made.
    """
    check_folder(output)
    figures_path, page_path = Path(output) / "report.json", Path(output) / "report.html"
    for path in (figures_path, page_path):
        check_keeps(path, (reference, hypothesis))
    curves = read_curves(logs) if logs is not None else None
    result = score(reference, hypothesis, by="language", fold_accents=fold_accents, seed=seed)
    stats = _read_stats(Path(hypothesis).with_suffix(".stats.json"))
    result = replace(result, seconds=stats.pop("seconds", None))
    figures = {**stats, **result.to_dict(), "transcribe_seconds": result.seconds, "seconds": seconds}
    write_text(figures_path, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    routing = _routing(model, reference) if model is not None else None
    write_text(page_path, page(result, curves, routing))
    return result


def _read_stats(path: Path) -> dict[str, Any]:
    """What `transcribe` has written beside its transcripts; nothing if there is no such file."""
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise MoleError(f"{path}: cannot be read ({error}); delete it, or transcribe again") from None
    seconds = stats.get("seconds", 0.0) if isinstance(stats, dict) else None
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise MoleError(f"{path}: not the figures of a transcription; delete it, or transcribe again")
    return stats


def _routing(model: str | Path, reference: str | Path) -> Routing | None:
    """The routing of the longest utterance short enough for a picture; None, and a warning, if it cannot be had."""
    try:
        manifest = Manifest(reference)
        if not len(manifest):
            raise MoleError(f"{reference}: no utterance")
        fitting = np.where(manifest.durations_s <= LONGEST_PICTURE_S, manifest.durations_s, -manifest.durations_s)
        return hear_languages(model, manifest[int(fitting.argmax())])
    except (MoleError, OSError) as error:
        print(f"no picture of the routing: {error}", file=sys.stderr)
        return None
