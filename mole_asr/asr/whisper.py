"""Whisper's features and encoder (Radford et al., 2022), for utterances of their true length.

Whisper itself pads every utterance with silence to 30 s and attends over it; here, attention sees valid frames only.

Letters: B batch, S samples, C bins of the Fourier transform, F mel bins, T frames, D model width, H heads, G = B x H,
W width of a head (D / H).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.attention import SelfAttention, key_mask_bias
from mole_asr.asr.conformer import Frames
from mole_asr.asr.subsampling import windows
from mole_asr.audio.features import valid_mask
from mole_asr.audio.read import SAMPLING_RATE_HZ
from mole_asr.errors import MoleError
from mole_asr.moe.experts import Activation, activate
from mole_asr.moe.rows import PackedRows

HOP = 160
N_FFT = 400
SEGMENT_SAMPLES = 30 * SAMPLING_RATE_HZ
SEGMENT_FRAMES = SEGMENT_SAMPLES // HOP
DYNAMIC_RANGE = 8.0  # of log10 power below the loudest band and frame of an utterance


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of a Whisper model (Radford et al., 2022, table 1).

    Attributes:
        num_mels: F, 80 (128 from large-v3 on).
        d_model: D, of encoder and decoder.
        d_ff: width of the feed-forward parts.
        encoder_layers: blocks of the encoder.
        encoder_heads: H of the encoder.
        decoder_layers: blocks of the decoder.
        decoder_heads: H of the decoder.
        vocab_size: tokens, special ones included.
        max_frames: positions of the encoder, 20 ms each.
        max_tokens: positions of the decoder.
    """

    num_mels: int
    d_model: int
    d_ff: int
    encoder_layers: int
    encoder_heads: int
    decoder_layers: int
    decoder_heads: int
    vocab_size: int
    max_frames: int = 1500
    max_tokens: int = 448


class WhisperFeatures(nn.Module):
    """Log-mel energies as Whisper takes them, of true length.

    Frames beyond an utterance's length are what Whisper would see there: the decay of the last window, then silence.

    Args:
        num_mels: F.
    """

    window_S: Tensor
    fbanks_CF: Tensor

    def __init__(self, num_mels: int = 80) -> None:
        super().__init__()
        fbanks_CF = torchaudio.functional.melscale_fbanks(
            N_FFT // 2 + 1, 0.0, SAMPLING_RATE_HZ / 2, num_mels, SAMPLING_RATE_HZ, norm="slaney", mel_scale="slaney"
        )
        # Rebuilt from the sizes above, so they have no place in a checkpoint.
        self.register_buffer("window_S", torch.hann_window(N_FFT), persistent=False)
        self.register_buffer("fbanks_CF", fbanks_CF, persistent=False)

    def forward(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Computes features without gradient, always in float32.

        Args:
            audio_BS: float32 waveforms at 16 kHz, zero beyond their lengths.
            lengths_B: int64, samples.

        Returns:
            features_BTF with two frames more than the longest utterance has (for the convolutions to look at; none
            beyond 30 s), and the lengths in frames: samples / 160, rounded up.
        """
        with torch.no_grad(), torch.autocast(audio_BS.device.type, enabled=False):
            size = -(-audio_BS.shape[1] // HOP) * HOP + 2 * HOP
            # Whisper reflects at the end of the 30 s; any earlier end is followed by silence.
            samples = max(audio_BS.shape[1], min(size + N_FFT, SEGMENT_SAMPLES))
            padded_BS = functional.pad(audio_BS.float(), (0, samples - audio_BS.shape[1]))
            spectrum_BCT = torch.stft(padded_BS, N_FFT, HOP, window=self.window_S, return_complex=True)
            spectrum_BCT = spectrum_BCT[:, :, : min(size, samples) // HOP]
            # Written out: torchaudio's spectrogram takes the absolute value first, three times slower.
            power_BTC = (spectrum_BCT.real.square() + spectrum_BCT.imag.square()).transpose(1, 2)
            log_BTF = (power_BTC @ self.fbanks_CF).clamp(min=1e-10).log10()
            frames_B = (lengths_B + HOP - 1) // HOP
            valid_BT1 = valid_mask(frames_B, log_BTF.shape[1])[:, :, None]
            loudest_B11 = log_BTF.masked_fill(~valid_BT1, -10.0).amax((1, 2), keepdim=True)
            return (log_BTF.maximum(loudest_B11 - DYNAMIC_RANGE) + 4.0) / 4.0, frames_B


def sinusoids(size: int, d_model: int) -> Tensor:
    """Positions of Whisper's encoder: float32 [size, D], sines in the first half, cosines in the second."""
    rate_D = torch.exp(-math.log(10000.0) / (d_model // 2 - 1) * torch.arange(d_model // 2))
    angle_TD = torch.arange(size)[:, None] * rate_D[None, :]
    return torch.cat([angle_TD.sin(), angle_TD.cos()], dim=1)


class WhisperStem(nn.Module):
    """Two convolutions over time with GELU, the second of stride 2, plus positions: 10 ms features to 20 ms frames.

    Args:
        num_mels: F.
        d_model: D.
        max_frames: positions there are.
    """

    positions_TD: Tensor

    def __init__(self, num_mels: int, d_model: int, max_frames: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * num_mels, d_model)
        self.second = nn.Linear(3 * d_model, d_model)
        # Kept with the weights: checkpoints hold these numbers rounded, and a few frames feel the difference.
        self.register_buffer("positions_TD", sinusoids(max_frames, d_model))

    def forward(self, features_BTF: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Subsamples features.

        Args:
            features_BTF: what stands beyond an utterance's length reaches its last frame, as in Whisper.
            frames_B: int64, valid frames of features.

        Returns:
            x_BTD of as many frames as the longest utterance has, and its lengths: half of frames_B, rounded up.

        Raises:
            MoleError: an utterance is longer than the positions reach.
        """
        size, limit = (int(frames_B.max()) + 1) // 2, len(self.positions_TD)
        if size > limit:
            raise MoleError(
                f"an utterance has {size * 0.02:.1f} s, but Whisper's positions end at {limit * 0.02:.0f} s; cut it"
            )
        x_BTD = functional.gelu(self.first(windows(features_BTF, size=3)))
        x_BTD = functional.gelu(self.second(windows(x_BTD, size=3, stride=2)[:, :size]))
        return x_BTD.float() + self.positions_TD[:size], (frames_B + 1) // 2


def whisper_frames(lengths_B: Tensor, size: int, num_heads: int) -> Frames:
    """Describes a batch padded to `size` frames for blocks without relative positions: bias_G1T masks padded keys."""
    valid_BT = valid_mask(lengths_B, size)
    bias_G1T = key_mask_bias(valid_BT, num_heads)
    rows = PackedRows.from_lengths(lengths_B, size)
    return Frames(lengths_B=lengths_B, valid_BT=valid_BT, bias_GTT=bias_G1T, rows=rows)


class WhisperFeedForward(nn.Module):
    """LayerNorm, then D -> F -> D. A mixture of experts with the same `forward` can stand in its place.

    Args:
        d_model: D.
        d_ff: F.
        activation: Whisper's is the exact GELU.
    """

    def __init__(self, d_model: int, d_ff: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(d_model)
        self.w1 = nn.Linear(d_model, d_ff)
        self.w2 = nn.Linear(d_ff, d_model)

    def forward(self, x_BTD: Tensor, frames: Frames | None = None, decision: object = None) -> Tensor:
        """Computes all frames; neither `frames` nor `decision` is looked at."""
        return self.w2(activate(self.w1(self.norm(x_BTD)), self.activation))


class WhisperBlock(nn.Module):
    """Self-attention, feed-forward; `feed_forward` may be replaced.

    Args:
        d_model: D.
        d_ff: width of the feed-forward part.
        num_heads: H.
    """

    def __init__(self, d_model: int, d_ff: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, num_heads)
        self.feed_forward: nn.Module = WhisperFeedForward(d_model, d_ff)

    def forward(self, x_BTD: Tensor, frames: Frames, decision: object = None) -> Tensor:
        """Transforms x_BTD; frames come from `whisper_frames`; `decision` is for a mixture of experts only."""
        x_BTD = x_BTD + self.attention(x_BTD, frames.bias_GTT)
        return x_BTD + self.feed_forward(x_BTD, frames, decision)


class PretrainedEncoder(nn.Module):
    """Stem, blocks, last norm, to be run one by one: a mixture of experts stands between and in the blocks.

    Attributes:
        config: with `encoder_heads`.
        activation: of the feed-forward parts.
    """

    activation: Activation = "gelu"
    config: Any
    stem: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module

    def frames(self, lengths_B: Tensor, size: int) -> Frames:
        """What the blocks need to know of a batch padded to `size` frames."""
        return whisper_frames(lengths_B, size, self.config.encoder_heads)

    def forward(self, inputs: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes what the stem takes: x_BTD in float32, and its lengths in frames of 20 ms."""
        x_BTD, lengths_B = self.stem(inputs, lengths_B)
        frames = self.frames(lengths_B, x_BTD.shape[1])
        for block in self.blocks:
            x_BTD = block(x_BTD, frames)
        return self.norm(x_BTD), lengths_B


class WhisperEncoder(PretrainedEncoder):
    """Takes features of `WhisperFeatures`."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = WhisperStem(config.num_mels, config.d_model, config.max_frames)
        self.blocks = nn.ModuleList(
            WhisperBlock(config.d_model, config.d_ff, config.encoder_heads) for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)
