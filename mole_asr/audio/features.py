"""Log-mel features, computed from waveforms on the model's device.

Letters: B batch, S samples, T frames, C bins of the Fourier transform, F mel bins.
"""

import torch
import torchaudio
from torch import Tensor, nn

from mole_asr.audio.read import SAMPLING_RATE_HZ

FRAME_SHIFT_S = 0.010
# The encoder makes one frame of so many: 40 ms.
SUBSAMPLING = 4
WINDOW_S = 0.025
# About the noise of a quiet 16-bit recording, so that digital silence does not stand out from it.
POWER_FLOOR = 1e-6


def valid_mask(lengths_B: Tensor, size: int) -> Tensor:
    """bool[B, size]: True where a frame belongs to the utterance."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


class LogMel(nn.Module):
    """Log-mel energies, normalised to mean 0 (each band) and variance 1 (all bands) over each utterance.

    The normalisation takes away the level and the frequency response of the microphone; it sees valid frames only.

    Args:
        num_mels: F.
    """

    window_S: Tensor
    fbanks_CF: Tensor

    def __init__(self, num_mels: int = 80) -> None:
        super().__init__()
        self.hop = round(FRAME_SHIFT_S * SAMPLING_RATE_HZ)
        window = round(WINDOW_S * SAMPLING_RATE_HZ)
        self.n_fft = 2 ** (window - 1).bit_length()
        fbanks_CF = torchaudio.functional.melscale_fbanks(
            self.n_fft // 2 + 1, 20.0, 0.475 * SAMPLING_RATE_HZ, num_mels, SAMPLING_RATE_HZ
        )
        # Rebuilt from the sizes above, so they have no place in a checkpoint.
        self.register_buffer("window_S", torch.hann_window(window), persistent=False)
        self.register_buffer("fbanks_CF", fbanks_CF, persistent=False)

    def forward(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Computes features without gradient, always in float32.

        Args:
            audio_BS: float32 waveforms at 16 kHz, zero beyond their lengths.
            lengths_B: int64, samples.

        Returns:
            features_BTF, zero beyond their lengths, and the lengths in frames: samples // hop + 1.
        """
        with torch.no_grad(), torch.autocast(audio_BS.device.type, enabled=False):
            spectrum_BCT = torch.stft(
                audio_BS.float(),
                self.n_fft,
                self.hop,
                win_length=len(self.window_S),
                window=self.window_S,
                # Zeros beyond both ends: then the zeros that pad a batch change no frame.
                pad_mode="constant",
                return_complex=True,
            )
            # Written out: torchaudio's spectrogram takes the absolute value first, three times slower.
            power_BTC = (spectrum_BCT.real.square() + spectrum_BCT.imag.square()).transpose(1, 2)
            log_BTF = (power_BTC @ self.fbanks_CF).clamp(min=POWER_FLOOR).log()
            frames_B = lengths_B // self.hop + 1
            valid_BT1 = valid_mask(frames_B, log_BTF.shape[1])[:, :, None]
            count_B11 = frames_B[:, None, None]
            centred_BTF = (log_BTF - (log_BTF * valid_BT1).sum(1, keepdim=True) / count_B11) * valid_BT1
            variance_B11 = centred_BTF.square().sum((1, 2), keepdim=True) / (count_B11 * log_BTF.shape[2])
            return centred_BTF / (variance_B11 + 1e-4).sqrt(), frames_B
