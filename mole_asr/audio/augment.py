"""Augmentation of waveforms, and SpecAugment on features.

Everything random comes from a generator that is handed in, so a batch is the same whoever makes it, and whenever.
Letters: B batch, S samples, T frames, F mel bins, M masks.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from mole_asr.arguments import check_range
from mole_asr.audio.features import valid_mask
from mole_asr.audio.read import resample
from mole_asr.errors import MoleError


@dataclass(frozen=True)
class AugmentConfig:
    """How waveforms are varied in training; each change is drawn for itself.

    Attributes:
        speed_probability: how often the speed (and with it the pitch) is changed.
        speeds: factors to draw from; above 1 is faster.
        noise_probability: how often white or pink noise is added.
        min_snr_db: loudest noise, as a signal-to-noise ratio.
        max_snr_db: softest noise.
        telephone_probability: how often the audio goes through a telephone (8 kHz, 8-bit mu-law).
        gain_probability: how often the level is changed.
        min_gain_db: softest level.
        max_gain_db: loudest level.
    """

    speed_probability: float = 0.8
    speeds: tuple[float, ...] = (0.9, 0.95, 1.05, 1.1)
    noise_probability: float = 0.3
    min_snr_db: float = 10.0
    max_snr_db: float = 40.0
    telephone_probability: float = 0.1
    gain_probability: float = 0.5
    min_gain_db: float = -12.0
    max_gain_db: float = 6.0

    def __post_init__(self) -> None:
        chances = {name: value for name, value in vars(self).items() if name.endswith("_probability")}
        check_range("data.augment", 0, 1, **chances)
        for name in ("snr_db", "gain_db"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            check_range("data.augment", -math.inf, math.inf, **{f"min_{name}": least, f"max_{name}": most})
            if least > most:
                raise MoleError(f"data.augment.min_{name}: {least} is above max_{name}; swap the two")
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise MoleError(f"data.augment.speeds: {list(self.speeds)}; give at least one factor from 0.5 to 2")

    @property
    def longest_stretch(self) -> float:
        """Duration of the slowest version over the original's."""
        return 1 / min((1.0, *self.speeds)) if self.speed_probability > 0 else 1.0

    @property
    def shortest_stretch(self) -> float:
        """Duration of the fastest version over the original's."""
        return 1 / max((1.0, *self.speeds)) if self.speed_probability > 0 else 1.0


def augment(audio_S: np.ndarray, config: AugmentConfig, rng: np.random.Generator, sampling_rate_hz: int) -> np.ndarray:
    """Varies one waveform.

    Args:
        audio_S: float32 [S]; left as it is.
        config: what to do, how often and how much.
        rng: source of all randomness.
        sampling_rate_hz: rate of input and output.

    Returns:
        float32 [S'], S' / S between `config.shortest_stretch` and `config.longest_stretch`.
    """
    if rng.random() < config.speed_probability:
        audio_S = change_speed(audio_S, float(rng.choice(config.speeds)), sampling_rate_hz)
    if rng.random() < config.noise_probability:
        audio_S = add_noise(audio_S, rng.uniform(config.min_snr_db, config.max_snr_db), rng)
    if rng.random() < config.telephone_probability:
        audio_S = telephone(audio_S, sampling_rate_hz)
    if rng.random() < config.gain_probability:
        audio_S = audio_S * np.float32(10 ** (rng.uniform(config.min_gain_db, config.max_gain_db) / 20))
    return audio_S


def change_speed(audio_S: np.ndarray, speed: float, sampling_rate_hz: int) -> np.ndarray:
    """Plays float32 [S] `speed` times as fast: float32 [ceil(S / speed)], pitch moved by the same factor."""
    return resample(audio_S, round(sampling_rate_hz * speed), sampling_rate_hz)


def add_noise(audio_S: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Adds stationary noise, white or pink, `snr_db` below the mean power of float32 [S]."""
    noise_S = _noise(pink=bool(rng.random() < 0.5))
    noise_S = np.take(noise_S, rng.integers(len(noise_S)) + np.arange(len(audio_S)), mode="wrap")
    level = np.sqrt(np.mean(np.square(audio_S)) * 10 ** (-snr_db / 10))
    return audio_S + noise_S * np.float32(level)


@lru_cache
def _noise(pink: bool) -> np.ndarray:
    """33 s (at 16 kHz) of noise of power 1: a random part of it costs far less than fresh noise."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(1 << 19))
    if pink:
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0
    noise_S = np.fft.irfft(spectrum)
    return (noise_S / noise_S.std()).astype(np.float32)


def telephone(audio_S: np.ndarray, sampling_rate_hz: int) -> np.ndarray:
    """Sends float32 [S] through a telephone line: 8 kHz, 8-bit mu-law (ITU-T G.711), and back."""
    narrow_S = np.clip(resample(audio_S, sampling_rate_hz, 8000), -1, 1)
    coded_S = np.round(127 * np.log1p(255 * np.abs(narrow_S)) / np.log(256)) / 127
    decoded_S = np.sign(narrow_S) * np.expm1(coded_S * np.log(256)) / 255
    return resample(decoded_S.astype(np.float32), 8000, sampling_rate_hz)[: len(audio_S)]


class SpecAugment(nn.Module):
    """Masks bands of frequencies and stretches of time with the utterance's mean; does nothing in evaluation.

    Number and width of the time masks grow with the utterance (adaptive multiplicity and size of Park et al.,
    "SpecAugment on Large Scale Datasets", ICASSP 2020), so that a short prompt keeps enough to be recognised.

    Args:
        frequency_masks: number of frequency masks.
        max_frequency_bins: widest frequency mask.
        time_masks_per_frame: number of time masks, as a share of the frames.
        max_time_masks: most time masks of an utterance.
        max_time_share: widest time mask, as a share of the frames.
    """

    def __init__(
        self,
        frequency_masks: int = 2,
        max_frequency_bins: int = 12,
        time_masks_per_frame: float = 0.008,
        max_time_masks: int = 10,
        max_time_share: float = 0.06,
    ) -> None:
        super().__init__()
        self.frequency_masks = frequency_masks
        self.max_frequency_bins = max_frequency_bins
        self.time_masks_per_frame = time_masks_per_frame
        self.max_time_masks = max_time_masks
        self.max_time_share = max_time_share

    def forward(self, features_BTF: Tensor, lengths_B: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Masks features in training mode.

        Args:
            features_BTF: log-mel features; left as they are.
            lengths_B: int64, valid frames; what lies behind them is not touched.
            generator: source of all randomness (a CPU one gives the same masks on every device); default: torch's.

        Returns:
            Features of the same shape.
        """
        if not self.training:
            return features_BTF
        B, T, F = features_BTF.shape
        random_4BM = torch.rand(4, B, self.max_time_masks + self.frequency_masks, generator=generator)
        random_4BM = random_4BM.to(features_BTF.device)
        times_2BM, frequencies_2BM = random_4BM[:2, :, : self.max_time_masks], random_4BM[2:, :, self.max_time_masks :]

        counts_B = (lengths_B * self.time_masks_per_frame).floor()
        active_BM = valid_mask(counts_B, self.max_time_masks)
        time_BT = _spans(times_2BM, lengths_B[:, None] * self.max_time_share * active_BM, lengths_B[:, None], T)
        widest_BM = torch.full_like(frequencies_2BM[0], min(self.max_frequency_bins, F))
        frequency_BF = _spans(frequencies_2BM, widest_BM, torch.full_like(lengths_B, F)[:, None], F)

        valid_BT1 = valid_mask(lengths_B, T)[:, :, None]
        mean_B11 = (features_BTF * valid_BT1).sum((1, 2), keepdim=True) / (lengths_B[:, None, None] * F).clamp(min=1)
        mask_BTF = (time_BT[:, :, None] | frequency_BF[:, None, :]) & valid_BT1
        return torch.where(mask_BTF, mean_B11.to(features_BTF.dtype), features_BTF)


def _spans(random_2BM: Tensor, widest_BM: Tensor, ends_B1: Tensor, size: int) -> Tensor:
    """Union of M random spans, bool[B, size]: widths 0..widest, each wholly before its end."""
    widths_BM = (random_2BM[0] * (widest_BM.floor() + 1)).floor().clamp(max=ends_B1)
    starts_BM = (random_2BM[1] * (ends_B1 - widths_BM + 1)).floor()
    at = torch.arange(size, device=random_2BM.device)
    return ((at >= starts_BM[:, :, None]) & (at < (starts_BM + widths_BM)[:, :, None])).any(1)
