"""Log-mel features, computed from waveforms on the model's device.

Letters: B batch, S samples, T frames, F mel bins.
"""

import torch
import torchaudio
from torch import Tensor, nn

FRAME_SHIFT_S = 0.010
WINDOW_S = 0.025
# Below the quantisation noise of 16-bit audio, so that digital silence has a finite logarithm.
POWER_FLOOR = 1e-6


class LogMel(nn.Module):
    """Log-mel energies, normalised to mean 0 (each band) and variance 1 (all bands) over each utterance.

    The normalisation takes away the level and the frequency response of the microphone; it sees valid frames only.

    Args:
        sampling_rate_hz: rate of the waveforms.
        num_mels: F.
    """

    def __init__(self, sampling_rate_hz: int = 16000, num_mels: int = 80) -> None:
        super().__init__()
        self.hop = round(FRAME_SHIFT_S * sampling_rate_hz)
        self.mel = torchaudio.transforms.MelSpectrogram(
            sampling_rate_hz,
            n_fft=512 if sampling_rate_hz == 16000 else 2 ** (round(WINDOW_S * sampling_rate_hz) - 1).bit_length(),
            win_length=round(WINDOW_S * sampling_rate_hz),
            hop_length=self.hop,
            f_min=20.0,
            f_max=0.475 * sampling_rate_hz,
            n_mels=num_mels,
            # Zeros beyond both ends: then the zeros that pad a batch change no frame.
            pad_mode="constant",
        )
        # Rebuilt from the sizes above, so they have no place in a checkpoint.
        self.mel.spectrogram.register_buffer("window", self.mel.spectrogram.window, persistent=False)
        self.mel.mel_scale.register_buffer("fb", self.mel.mel_scale.fb, persistent=False)

    def forward(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Computes features without gradient, always in float32.

        Args:
            audio_BS: float32 waveforms, zero beyond their lengths.
            lengths_B: int64, samples.

        Returns:
            features_BTF, zero beyond their lengths, and the lengths in frames: samples // hop + 1.
        """
        with torch.no_grad(), torch.autocast(audio_BS.device.type, enabled=False):
            log_BTF = self.mel(audio_BS.float()).clamp(min=POWER_FLOOR).log().transpose(1, 2)
            frames_B = lengths_B // self.hop + 1
            valid_BT1 = (torch.arange(log_BTF.shape[1], device=lengths_B.device) < frames_B[:, None])[:, :, None]
            count_B11 = frames_B[:, None, None]
            centred_BTF = (log_BTF - (log_BTF * valid_BT1).sum(1, keepdim=True) / count_B11) * valid_BT1
            variance_B11 = centred_BTF.square().sum((1, 2), keepdim=True) / (count_B11 * log_BTF.shape[2])
            return centred_BTF / (variance_B11 + 1e-4).sqrt(), frames_B
