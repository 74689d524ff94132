"""The recogniser: waveforms to token log-probabilities. Read this file first, then `conformer.py`.

Letters: B batch, S samples, T frames, F mel bins, D model width, V vocabulary, N languages.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from mole_asr.asr.attention_head import AttentionHead
from mole_asr.asr.conformer import ConformerBlock, FeedForward, Frames
from mole_asr.asr.mixture import Decision, ExpertMixture, MixtureConfig, MixtureFeedForward
from mole_asr.asr.subsampling import Subsampling
from mole_asr.audio.features import FRAME_SHIFT_S, SUBSAMPLING, LogMel
from mole_asr.errors import MoleError
from mole_asr.moe.parts import PartedInput, PartedLinear, log_softmax


@dataclass(frozen=True)
class EncoderConfig(MixtureConfig):
    """Sizes of the model, beside the switches of its MoLE blocks; the defaults are those of the five-language demo.

    Attributes:
        d_model: D, width of the residual stream.
        d_ff: width of each feed-forward part, and of each expert if `expert_d_ff` does not say.
        num_blocks: Conformer blocks.
        num_mole_blocks: how many of them, at the top, are MoLE blocks; 0 makes a dense model.
        language_tokenizer_block: blocks that the language tokenizer listens behind.
        num_heads: attention heads.
        kernel_size: of the depthwise convolutions, odd, in frames of 40 ms.
        dropout: of each part of a block.
        num_mels: F.
        intermediate_ctc_blocks: blocks behind which the CTC head is asked too; its answer goes back into the stream
            (self-conditioned CTC, Nozaki & Komatsu, 2021).
    """

    d_model: int = 192
    d_ff: int = 384
    num_blocks: int = 4
    num_mole_blocks: int = 2
    language_tokenizer_block: int = 2
    num_heads: int = 3
    kernel_size: int = 15
    dropout: float = 0.05
    num_mels: int = 80
    intermediate_ctc_blocks: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        dense = self.num_blocks - self.num_mole_blocks
        sizes = (self.d_model, self.d_ff, self.num_blocks, self.num_heads, self.kernel_size, self.num_mels)
        if min(sizes) < 1:
            raise MoleError(
                "model.encoder: d_model, d_ff, num_blocks, num_heads, kernel_size and num_mels must be positive"
            )
        problems = [
            (not 0 <= self.dropout < 1, f"dropout: {self.dropout:g} must be from 0 to below 1"),
            (self.num_mole_blocks < 0, f"num_mole_blocks: {self.num_mole_blocks} must not be negative"),
            (self.d_model % self.num_heads != 0, f"d_model: {self.d_model} is no multiple of num_heads"),
            (self.kernel_size % 2 == 0, f"kernel_size: {self.kernel_size} must be odd"),
            (not dense >= 0, f"num_mole_blocks: {self.num_mole_blocks} is more than num_blocks {self.num_blocks}"),
            (
                not 0 <= self.language_tokenizer_block <= dense,
                f"language_tokenizer_block: {self.language_tokenizer_block} must be 0..{dense}, before the MoLE blocks",
            ),
            (
                any(not 0 < block < self.num_blocks for block in self.intermediate_ctc_blocks),
                f"intermediate_ctc_blocks: {self.intermediate_ctc_blocks} must be between 1 and num_blocks - 1",
            ),
        ]
        self.refuse(problems)


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """What one forward gives.

    Attributes:
        log_probs_BTV: float32 token log-probabilities; id 0 is the blank.
        lengths_B: int64, frames of log_probs_BTV.
        decision: of the mixture: what the language tokenizer heard, and the plans of the MoLE blocks.
        frames: the padded batch's description, as the encoder sees it.
        intermediate_log_probs_BTV: of the intermediate CTC heads, lowest first.
        memory_BTD: float32 output of the encoder, for an attention head; its lengths are those of `frames`.
    """

    log_probs_BTV: Tensor
    lengths_B: Tensor
    decision: Decision
    frames: Frames
    intermediate_log_probs_BTV: list[Tensor] = field(default_factory=list)
    memory_BTD: Tensor | None = None

    @property
    def reliability_B(self) -> Tensor:
        """float32 r of each utterance (mean over its frames where the language is decided a frame)."""
        return self.decision.reliability_B

    @property
    def language_logits_BN(self) -> Tensor:
        """Language logits of each utterance."""
        return self.decision.evidence.logits_BN


class CTCHead(PartedLinear):
    """Linear -> log-softmax over tokens and blank (id 0), in float32."""

    def forward(self, x_BTD: Tensor, newest_B: Tensor | None = None) -> Tensor:
        """log_probs_BTV of the pieces up to a generation, or of all."""
        return log_softmax(super().forward(x_BTD).float(), self.parts, newest_B)


class MoleModel(nn.Module):
    """Log-mel, subsampling, Conformer blocks with MoLE blocks on top, CTC head.

    Args:
        config: sizes and switches.
        languages: codes, in the order of the language logits.
        vocab_size: V, blank included.
    """

    attention_head: AttentionHead | None = None  # `PretrainedModel` has one
    max_seconds = math.inf  # Whisper's positions end somewhere

    def __init__(self, config: EncoderConfig, languages: list[str], vocab_size: int) -> None:
        super().__init__()
        self.config = config = config.spelled_out(languages)
        self.languages, self.vocab_size = list(languages), vocab_size
        self.frame_shift_s = SUBSAMPLING * FRAME_SHIFT_S
        D = config.d_model
        self.log_mel = LogMel(config.num_mels)
        self.feature_augment: nn.Module | None = None
        self.subsampling = Subsampling(config.num_mels, D)
        self.mixture = ExpertMixture(config, languages, D)
        dense = config.num_blocks - config.num_mole_blocks
        self.blocks = nn.ModuleList(self._block(upper=index >= dense) for index in range(config.num_blocks))
        self.ctc = CTCHead(D, vocab_size)
        self.condition = PartedInput(vocab_size, D) if config.intermediate_ctc_blocks else None

    def _block(self, upper: bool) -> ConformerBlock:
        config = self.config
        out: FeedForward | MixtureFeedForward | None = None
        if upper and config.mixture == "dense":
            out = FeedForward(config.d_model, config.expert_d_ff or config.d_ff)
        elif upper:
            out = self.mixture.make_layer(config.d_ff)
        return ConformerBlock(
            config.d_model, config.d_ff, config.num_heads, config.kernel_size, config.dropout, feed_forward_out=out
        )

    def forward(
        self,
        audio_BS: Tensor,
        audio_lengths_B: Tensor,
        languages_B: Tensor | None = None,
        true_probability: float = 1.0,
    ) -> ModelOutput:
        """Recognises a padded batch.

        Args:
            audio_BS: float32 waveforms, zero beyond their lengths.
            audio_lengths_B: int64, samples.
            languages_B: int64 true languages, -1 where unknown. In training the configured routing says what they are
                for; in evaluation they are taken, so leave them out to let the model hear the language.
            true_probability: with the routing "scheduled", how often the true language is taken in training.
        """
        features_BTF, frames_B = self.log_mel(audio_BS, audio_lengths_B)
        if self.feature_augment is not None:
            features_BTF = self.feature_augment(features_BTF, frames_B)
        x_BTD, lengths_B = self.subsampling(features_BTF, frames_B)
        frames = Frames.of(lengths_B, x_BTD.shape[1], self.config.num_heads)

        decision, intermediate_log_probs_BTV = None, []
        newest_B = self.mixture.undecided(lengths_B)
        for index, block in enumerate(self.blocks):
            if index == self.config.language_tokenizer_block:
                x_BTD, decision = self.mixture(x_BTD, frames, languages_B, true_probability)
                newest_B = decision.newest_B
            x_BTD = block(x_BTD, frames, decision)
            if index + 1 in self.config.intermediate_ctc_blocks and self.condition is not None:
                log_probs_BTV = self.ctc(x_BTD, newest_B)
                intermediate_log_probs_BTV.append(log_probs_BTV)
                x_BTD = x_BTD + self.condition(log_probs_BTV.exp())
        if decision is None:
            x_BTD, decision = self.mixture(x_BTD, frames, languages_B, true_probability)
        log_probs_BTV = self.ctc(x_BTD, decision.newest_B)
        return ModelOutput(log_probs_BTV, lengths_B, decision, frames, intermediate_log_probs_BTV)
