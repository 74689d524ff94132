"""Convolutional subsampling: one frame for every four frames of features.

Letters: B batch, T frames, F mel bins, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def valid_mask(lengths_B: Tensor, size: int) -> Tensor:
    """bool[B, size]: True where a frame belongs to the utterance."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


class Subsampling(nn.Module):
    """Two convolutions over time of stride 2 (as whisper's stem): 10 ms features to 40 ms frames.

    Mel bands are channels. A 2-D stem costs more here than the whole encoder: at 64 channels, 37 MFLOP a frame.

    Args:
        num_mels: F.
        d_model: D.
    """

    def __init__(self, num_mels: int, d_model: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(num_mels, d_model, kernel_size=3, stride=2, padding=1)
        self.second = nn.Conv1d(d_model, d_model, kernel_size=3, stride=2, padding=1)
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
        x_BDT = functional.silu(self.first(features_BTF.transpose(1, 2)))
        # The second convolution looks one frame beyond the end.
        x_BDT = x_BDT * valid_mask((frames_B + 1) // 2, x_BDT.shape[2])[:, None]
        x_BTD = functional.silu(self.second(x_BDT)).transpose(1, 2)
        return self.norm(x_BTD.float()), self.output_lengths(frames_B)
