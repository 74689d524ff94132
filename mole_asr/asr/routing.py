"""What the language tokenizer hears in one utterance, frame by frame: the routing picture of the report."""

from pathlib import Path
from typing import Any

import torch

from mole_asr.asr.checkpoint import load_model
from mole_asr.audio.read import read_audio
from mole_asr.corpus.manifest import Utterance


def routing_picture(model: str | Path, utterance: Utterance) -> dict[str, Any]:
    """Runs a trained model on one utterance and returns what its language tokenizer says.

    Args:
        model: folder of the trained model.
        utterance: of a manifest; its true language is not told to the model.

    Returns:
        `id`, `text`, `languages` [N], `frame_shift_s`, `evidence` (language posterior of each frame, [T][N], each
        frame summing to 1) and `reliability` (0 to 1).

    Raises:
        MoleError: the model or the recording cannot be read.
    """
    recogniser, _ = load_model(model)
    rate_hz = recogniser.config.sampling_rate_hz
    audio_S = torch.from_numpy(read_audio(utterance.audio_path, rate_hz, utterance.start_s, utterance.duration_s))
    with torch.inference_mode():
        output = recogniser(audio_S[None], torch.tensor([len(audio_S)]))
    evidence_TN = output.language_evidence_BTN[0, : int(output.lengths_B[0])].float().softmax(dim=-1)
    return {
        "id": utterance.id,
        "text": utterance.text,
        "languages": recogniser.languages,
        "frame_shift_s": recogniser.frame_shift_s,
        "evidence": evidence_TN.tolist(),
        "reliability": float(output.reliability_B[0]),
    }
