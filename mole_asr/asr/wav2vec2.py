"""The encoder of wav2vec 2.0 (Baevski et al., 2020), XLS-R (Babu et al., 2021) and MMS (Pratap et al., 2023).

Nothing an utterance gives depends on the padding of its batch, which is not so in the first models as published: they
normalise the first convolution over padding too.

Letters: B batch, S samples, T frames, C channels, K kernel, D model width, F feed-forward width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.attention import SelfAttention
from mole_asr.asr.conformer import Frames
from mole_asr.asr.whisper import PretrainedEncoder, WhisperBlock, WhisperFeedForward
from mole_asr.audio.features import valid_mask


@dataclass(frozen=True)
class Wav2Vec2Config:
    """Sizes and switches of a model.

    Attributes:
        conv_channels: of the convolutions on the waveform.
        conv_kernels: their kernels.
        conv_strides: their strides.
        conv_bias: whether they have biases.
        group_norm: whether the first convolution alone is normalised, each channel over time (base models); otherwise
            each is, each frame over channels.
        d_model: D.
        d_ff: F.
        encoder_layers: blocks.
        encoder_heads: attention heads of a block.
        position_kernel: frames that the convolution for positions sees.
        position_groups: its groups of channels.
        norm_first: whether blocks normalise their inputs (large models), or their outputs (base models).
        waveform_eps: the waveform is brought to mean 0 and variance 1, with so much added to the variance; None leaves
            it as it is.
    """

    conv_channels: tuple[int, ...]
    conv_kernels: tuple[int, ...]
    conv_strides: tuple[int, ...]
    conv_bias: bool
    group_norm: bool
    d_model: int
    d_ff: int
    encoder_layers: int
    encoder_heads: int
    position_kernel: int
    position_groups: int
    norm_first: bool
    waveform_eps: float | None


def normalized(x_BTC: Tensor, lengths_B: Tensor, eps: float) -> Tensor:
    """Brings each channel of an utterance to mean 0 and variance 1 over its valid frames; float32, zero beyond."""
    valid_BT1 = valid_mask(lengths_B, x_BTC.shape[1])[:, :, None]
    count_B11 = lengths_B[:, None, None].clamp(min=1)
    mean_B1C = (x_BTC.float() * valid_BT1).sum(1, keepdim=True) / count_B11
    centred_BTC = (x_BTC.float() - mean_B1C) * valid_BT1
    return centred_BTC * (centred_BTC.square().sum(1, keepdim=True) / count_B11 + eps).rsqrt()


class UtteranceNorm(nn.Module):
    """GroupNorm with a group a channel, over the valid frames of each utterance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BTC: Tensor, lengths_B: Tensor) -> Tensor:
        """Normalises over time."""
        return normalized(x_BTC, lengths_B, eps=1e-5) * self.weight + self.bias


class WaveformLayer(nn.Module):
    """A convolution without padding, as a linear layer on windows; perhaps a norm; GELU.

    Args:
        inputs: channels.
        channels: C.
        kernel: K.
        stride: of the convolution.
        bias: whether it has one.
        norm: None, or what normalises its output.
    """

    def __init__(
        self, inputs: int, channels: int, kernel: int, stride: int, bias: bool, norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.linear = nn.Linear(kernel * inputs, channels, bias)
        self.norm = norm

    def forward(self, x_BTC: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns frames and their number; one that would see samples beyond the end is left out."""
        size = (x_BTC.shape[1] - self.kernel) // self.stride + 1
        lengths_B = ((lengths_B - self.kernel) // self.stride + 1).clamp(min=1)
        last = self.stride * (size - 1) + 1
        if x_BTC.shape[2] == 1:
            windows = x_BTC[:, :, 0].unfold(1, self.kernel, self.stride)
        else:
            windows = torch.cat([x_BTC[:, k : k + last : self.stride] for k in range(self.kernel)], dim=-1)
        y_BTC = self.linear(windows)
        if isinstance(self.norm, UtteranceNorm):
            y_BTC = self.norm(y_BTC, lengths_B)
        elif self.norm is not None:
            y_BTC = self.norm(y_BTC)
        return functional.gelu(y_BTC), lengths_B


class Wav2Vec2Stem(nn.Module):
    """Convolutions on the waveform, projection, positions from a convolution: 20 ms frames for the usual sizes."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.waveform_eps = config.waveform_eps
        self.layers = nn.ModuleList()
        inputs = 1
        sizes = zip(config.conv_channels, config.conv_kernels, config.conv_strides, strict=True)
        for number, (channels, kernel, stride) in enumerate(sizes):
            norm: nn.Module | None = nn.LayerNorm(channels)
            if config.group_norm:
                norm = UtteranceNorm(channels) if number == 0 else None
            self.layers.append(WaveformLayer(inputs, channels, kernel, stride, config.conv_bias, norm))
            inputs = channels
        # Samples of the first frame: what an utterance must have at least.
        self.window = 1
        for kernel, stride in zip(reversed(config.conv_kernels), reversed(config.conv_strides), strict=True):
            self.window = (self.window - 1) * stride + kernel
        self.projection_norm = nn.LayerNorm(inputs)
        self.projection = nn.Linear(inputs, config.d_model)
        self.position = nn.Conv1d(
            config.d_model,
            config.d_model,
            config.position_kernel,
            padding=config.position_kernel // 2,
            groups=config.position_groups,
        )
        self.norm = nn.Identity() if config.norm_first else nn.LayerNorm(config.d_model)

    def forward(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Makes frames of waveforms at 16 kHz.

        Args:
            audio_BS: zero beyond their lengths.
            lengths_B: int64, samples.

        Returns:
            x_BTD, float32, and its lengths in frames, at least 1.
        """
        x_BTC = functional.pad(audio_BS, (0, max(0, self.window - audio_BS.shape[1])))[:, :, None]
        if self.waveform_eps is not None:
            x_BTC = normalized(x_BTC, lengths_B, self.waveform_eps)
        for layer in self.layers:
            x_BTC, lengths_B = layer(x_BTC, lengths_B)
        x_BTD = self.projection(self.projection_norm(x_BTC))
        x_BTD = x_BTD * valid_mask(lengths_B, x_BTD.shape[1])[:, :, None]
        position_BTD = self.position(x_BTD.mT)[:, :, : x_BTD.shape[1]].mT
        return self.norm((x_BTD + functional.gelu(position_BTD)).float()), lengths_B


class PostNormBlock(nn.Module):
    """Self-attention, LayerNorm, feed-forward, LayerNorm: x = norm(a + feed_forward(a)), a = norm(x + attention(x)).

    The norm of a stands twice, at first alike: for the sum, and as `feed_forward.norm`. So a mixture of experts with a
    norm of its own can stand in for the feed-forward part, here as in other blocks.

    Args:
        d_model: D.
        d_ff: F.
        num_heads: of the attention.
    """

    def __init__(self, d_model: int, d_ff: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, num_heads)
        self.attention.norm = nn.Identity()  # type: ignore[assignment]
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward: nn.Module = WhisperFeedForward(d_model, d_ff)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x_BTD: Tensor, frames: Frames, decision: object = None) -> Tensor:
        """Transforms x_BTD; frames come from the encoder; `decision` is for a mixture of experts only."""
        sum_BTD = x_BTD + self.attention(x_BTD, frames.bias_GTT)
        return self.norm(self.attention_norm(sum_BTD) + self.feed_forward(sum_BTD, frames, decision))


class Wav2Vec2Encoder(PretrainedEncoder):
    """Takes waveforms at 16 kHz."""

    stem: Wav2Vec2Stem

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = config
        block = WhisperBlock if config.norm_first else PostNormBlock
        self.stem = Wav2Vec2Stem(config)
        self.blocks = nn.ModuleList(
            block(config.d_model, config.d_ff, config.encoder_heads) for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()
