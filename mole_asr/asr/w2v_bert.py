"""The encoder of w2v-BERT 2.0 (Seamless Communication, 2023): a Conformer on filter banks.

Letters: B batch, S samples, T frames, F mel bins, D model width, H heads, G = B x H, W width of a head, R relative
positions, K kernel, N frames of 10 ms.
"""

from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.attention import SelfAttention, attend, merge_heads, split_heads
from mole_asr.asr.conformer import Frames
from mole_asr.asr.depthwise import depthwise_convolution
from mole_asr.asr.wav2vec2 import normalized
from mole_asr.asr.whisper import HOP, PretrainedEncoder, WhisperFeedForward
from mole_asr.audio.read import SAMPLING_RATE_HZ

WINDOW = 400
N_FFT = 512
STACK = 2  # frames of 10 ms that make one


@dataclass(frozen=True)
class W2vBertConfig:
    """Sizes of a model.

    Attributes:
        num_mels: F.
        d_model: D.
        d_ff: width of the feed-forward parts.
        encoder_layers: blocks.
        encoder_heads: H.
        kernel_size: K of the depthwise convolutions, which see the past only.
        left_positions: distances into the past that attention tells apart.
        right_positions: distances into the future.
    """

    num_mels: int
    d_model: int
    d_ff: int
    encoder_layers: int
    encoder_heads: int
    kernel_size: int
    left_positions: int
    right_positions: int


class FilterBanks(nn.Module):
    """Kaldi's log-mel filter banks, each bin of an utterance at mean 0 and variance 1, two frames stacked.

    Args:
        num_mels: F.
    """

    window_S: Tensor
    fbanks_CF: Tensor

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        banks, _ = torchaudio.compliance.kaldi.get_mel_banks(
            num_mels, N_FFT, SAMPLING_RATE_HZ, 20.0, SAMPLING_RATE_HZ / 2, 100.0, -500.0, 1.0
        )
        # Rebuilt from the sizes, so they have no place in a checkpoint.
        self.register_buffer("window_S", torch.hann_window(WINDOW, periodic=False) ** 0.85, persistent=False)
        self.register_buffer("fbanks_CF", functional.pad(banks, (0, 1)).T.contiguous(), persistent=False)

    def forward(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Computes features without gradient, always in float32.

        Args:
            audio_BS: float32 waveforms at 16 kHz.
            lengths_B: int64, samples.

        Returns:
            features [B, T, 2 F], zero beyond their lengths, and the lengths in frames of 20 ms, at least 1.
        """
        with torch.no_grad(), torch.autocast(audio_BS.device.type, enabled=False):
            shortest = WINDOW + HOP
            audio_BS = functional.pad(audio_BS.float(), (0, max(0, shortest - audio_BS.shape[1])))
            frames_BNS = audio_BS.unfold(1, WINDOW, HOP) * 2.0**15  # Kaldi's scale: 16-bit integers
            frames_BNS = frames_BNS - frames_BNS.mean(-1, keepdim=True)
            before_BNS = torch.cat([frames_BNS[..., :1], frames_BNS[..., :-1]], dim=-1)
            spectrum_BNC = torch.fft.rfft((frames_BNS - 0.97 * before_BNS) * self.window_S, N_FFT)
            power_BNC = spectrum_BNC.real.square() + spectrum_BNC.imag.square()
            log_BNF = (power_BNC @ self.fbanks_CF).clamp(min=torch.finfo(torch.float32).eps).log()
            counts_B = (lengths_B.clamp(min=shortest) - WINDOW) // HOP + 1
            scaled_BNF = normalized(log_BNF, counts_B, eps=1e-7)
            # The published features divide by the unbiased variance.
            unbias_B11 = ((counts_B - 1) / counts_B).sqrt()[:, None, None]
            size = scaled_BNF.shape[1] // STACK
            return (scaled_BNF * unbias_B11)[:, : STACK * size].reshape(len(audio_BS), size, -1), counts_B // STACK


class W2vBertStem(nn.Module):
    """Filter banks and a projection."""

    def __init__(self, config: W2vBertConfig) -> None:
        super().__init__()
        self.features = FilterBanks(config.num_mels)
        self.norm = nn.LayerNorm(STACK * config.num_mels)
        self.projection = nn.Linear(STACK * config.num_mels, config.d_model)

    def forward(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Makes 20 ms frames of waveforms at 16 kHz: x_BTD, float32, and their number, at least 1."""
        features, lengths_B = self.features(audio_BS, lengths_B)
        return self.projection(self.norm(features)).float(), lengths_B


class RelativeAttention(SelfAttention):
    """LayerNorm, then self-attention whose scores know the clipped distance between two frames (Shaw et al., 2018)."""

    def __init__(self, d_model: int, num_heads: int, left: int, right: int) -> None:
        super().__init__(d_model, num_heads)
        self.left, self.right = left, right
        self.distance_RW = nn.Parameter(torch.zeros(left + right + 1, d_model // num_heads))

    def forward(self, x_BTD: Tensor, bias_GTT: Tensor) -> Tensor:
        """Attends over all frames, with a bias ([G, 1, T]) on the scores."""
        query_GTW, key_GTW, value_GTW = split_heads(self.query_key_value(self.norm(x_BTD)), 3, self.num_heads)
        G, T, W = query_GTW.shape
        frame_T = torch.arange(T, device=x_BTD.device)
        index_TT = (frame_T[None, :] - frame_T[:, None]).clamp(-self.left, self.right) + self.left
        # Each query with each distance once, not with each pair of frames.
        score_GTR = (query_GTW @ self.distance_RW.T) * W**-0.5
        relative_GTT = score_GTR.gather(2, index_TT.expand(G, T, T)) + bias_GTT
        return self.output(merge_heads(attend(query_GTW, key_GTW, value_GTW, relative_GTT), self.num_heads))


class CausalConvolution(nn.Module):
    """LayerNorm, gated pointwise convolution, depthwise convolution over the past, LayerNorm, SiLU, pointwise."""

    def __init__(self, d_model: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.gated = nn.Linear(d_model, 2 * d_model, bias=False)
        self.depthwise_KD = nn.Parameter(torch.zeros(kernel_size, d_model))
        self.depthwise_norm = nn.LayerNorm(d_model)
        self.pointwise = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Convolves over time; padding at the end reaches no valid frame."""
        T, past = x_BTD.shape[1], len(self.depthwise_KD) // 2
        gated_BTD = functional.glu(self.gated(self.norm(x_BTD)), dim=-1)
        # A symmetric kernel, moved into the past by half its size.
        deep_BTD = depthwise_convolution(functional.pad(gated_BTD, (0, 0, past, 0)), self.depthwise_KD)[:, :T]
        return self.pointwise(functional.silu(self.depthwise_norm(deep_BTD)))


class W2vBertBlock(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward (it may be replaced), LayerNorm."""

    def __init__(self, config: W2vBertConfig) -> None:
        super().__init__()
        D = config.d_model
        self.feed_forward_in = WhisperFeedForward(D, config.d_ff, "silu")
        self.attention = RelativeAttention(D, config.encoder_heads, config.left_positions, config.right_positions)
        self.convolution = CausalConvolution(D, config.kernel_size)
        self.feed_forward: nn.Module = WhisperFeedForward(D, config.d_ff, "silu")
        self.norm = nn.LayerNorm(D)

    def forward(self, x_BTD: Tensor, frames: Frames, decision: object = None) -> Tensor:
        """Transforms x_BTD; frames come from the encoder; `decision` is for a mixture of experts only."""
        x_BTD = x_BTD + 0.5 * self.feed_forward_in(x_BTD)
        x_BTD = x_BTD + self.attention(x_BTD, frames.bias_GTT)
        x_BTD = x_BTD + self.convolution(x_BTD)
        return self.norm(x_BTD + 0.5 * self.feed_forward(x_BTD, frames, decision))


class W2vBertEncoder(PretrainedEncoder):
    """Takes waveforms at 16 kHz; its `norm` does nothing: the last block ends with a norm."""

    activation = "silu"

    def __init__(self, config: W2vBertConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = W2vBertStem(config)
        self.blocks = nn.ModuleList(W2vBertBlock(config) for _ in range(config.encoder_layers))
        self.norm = nn.Identity()
