"""What the language tokenizer hears in one utterance, frame by frame: the routing picture of the report."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mole_asr.corpus.manifest import Utterance


@dataclass(frozen=True, slots=True)
class Routing:
    """Language posteriors of every frame of one utterance: evidence_TN, each frame summing to about 1."""

    id: str
    text: str
    languages: list[str]
    frame_shift_s: float
    evidence_TN: np.ndarray
    reliability: float | None = None


def hear_languages(model: str | Path, utterance: Utterance) -> Routing:
    """Runs a trained model on one utterance and returns what its language tokenizer says.

    Args:
        model: folder of the trained model.
        utterance: of a manifest; its true language is not told to the model.

    Raises:
        MoleError: the model or the recording cannot be read.
    """
    # torch takes seconds to import, and no other part of a score needs it.
    import torch

    from mole_asr.asr.checkpoint import load_model

    recogniser, _ = load_model(model)
    audio_S = torch.from_numpy(utterance.read())
    with torch.inference_mode():
        output = recogniser(audio_S[None], torch.tensor([len(audio_S)]))
    evidence_TN = recogniser.mixture.language_posterior(
        output.decision.evidence.evidence_BTN[0, : int(output.lengths_B[0])]
    )
    return Routing(
        id=utterance.id,
        text=utterance.text,
        languages=recogniser.languages,
        frame_shift_s=recogniser.frame_shift_s,
        evidence_TN=evidence_TN.numpy(),
        reliability=float(output.reliability_B[0]),
    )
