"""A model and a tokenizer that need no training: each 40 ms of sound carries one token in its loudness."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from mole_asr.transcribe.transcriber import Transcriber

FRAME = 640
PIECES = ["<blank>", "<unk>", "▁a", "b", "▁c", "d", "▁é", "f", "▁g", "h"]


class LoudnessTokenizer:
    def piece(self, token_id: int) -> str:
        return PIECES[token_id]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(PIECES[i] for i in token_ids).replace("▁", " ").strip()


class LoudnessModel(torch.nn.Module):
    """Token = loudness x 20 of the frame. Language: "en" up to token 5, else "fr"."""

    languages = ("en", "fr")
    attention_head = None
    frame_shift_s = FRAME / 16000

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, int]] = []
        self.languages_given: list[list[int] | None] = []
        self.mixture = SimpleNamespace(language_posterior=lambda logits: logits.softmax(-1))

    def forward(
        self, audio_BS: torch.Tensor, audio_lengths_B: torch.Tensor, languages_B: torch.Tensor | None = None
    ) -> SimpleNamespace:
        assert not torch.is_grad_enabled()
        assert (audio_lengths_B > 0).all()
        self.batches.append(tuple(audio_BS.shape))
        self.languages_given.append(None if languages_B is None else languages_B.tolist())
        padded = torch.nn.functional.pad(audio_BS, (0, -audio_BS.shape[1] % FRAME))
        loudness_BT = padded.unflatten(1, (-1, FRAME)).abs().mean(-1)
        tokens_BT = (loudness_BT * 20).round().long().clamp(max=len(PIECES) - 1)
        french_B = (tokens_BT.max(dim=1).values > 5).float()
        probs_BTV = torch.nn.functional.one_hot(tokens_BT, len(PIECES)) * 0.9 + 0.01
        return SimpleNamespace(
            log_probs_BTV=probs_BTV.log(),
            lengths_B=-(-audio_lengths_B // FRAME),
            language_logits_BN=torch.stack([1 - french_B, french_B], dim=1) * 4,
            reliability_B=0.25 + 0.5 * french_B,
        )


def sound(tokens: list[int]) -> np.ndarray:
    """float32 [640 x tokens]: an alternating wave with the loudness of each token; 0 is silence."""
    wave = np.tile([1.0, -1.0], FRAME // 2)
    return np.concatenate([token / 20 * wave for token in tokens] or [np.zeros(0)]).astype(np.float32)


def write_sound(path: Path, tokens: list[int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(tokens), 16000)
    return path


@pytest.fixture
def transcriber() -> Transcriber:
    return Transcriber(LoudnessModel(), LoudnessTokenizer())
