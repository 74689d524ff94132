"""Convolutional subsampling: one frame for every four frames of features.

Letters: B batch, T frames, F mel bins, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.audio.features import valid_mask


def windows(x_BTC: Tensor, size: int, stride: int = 1) -> Tensor:
    """Every `stride`-th frame with its neighbours, `size` (odd) in all: [B, ceil(T / stride), size x C].

    Zeros stand beyond both ends. A linear layer on windows is a convolution; on CPUs it is three times as fast as one.
    """
    T, reach = x_BTC.shape[1], size // 2
    padded = functional.pad(x_BTC, (0, 0, reach, reach))
    return torch.cat([padded[:, k : k + T : stride] for k in range(size)], dim=-1)


class Subsampling(nn.Module):
    """Two convolutions over time of stride 2 (as whisper's stem): 10 ms features to 40 ms frames.

    Mel bands are channels. A 2-D stem costs more here than the whole encoder: at 64 channels, 37 MFLOP a frame.

    Args:
        num_mels: F.
        d_model: D.
    """

    def __init__(self, num_mels: int, d_model: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * num_mels, d_model)
        self.second = nn.Linear(3 * d_model, d_model)
        self.norm = nn.LayerNorm(d_model)

    @staticmethod
    def output_lengths(frames_B: Tensor) -> Tensor:
        """Frames after subsampling: half, rounded up, twice."""
        return ((frames_B + 1) // 2 + 1) // 2

    def forward(self, features_BTF: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Subsamples features that are zero beyond their lengths.

        Returns:
            x_BTD and its lengths in frames.
        """
        x_BTD = functional.silu(self.first(windows(features_BTF, size=3, stride=2)))
        # The second convolution looks one frame beyond the end.
        x_BTD = x_BTD * valid_mask((frames_B + 1) // 2, x_BTD.shape[1])[:, :, None]
        x_BTD = functional.silu(self.second(windows(x_BTD, size=3, stride=2)))
        return self.norm(x_BTD.float()), self.output_lengths(frames_B)
