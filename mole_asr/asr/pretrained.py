"""A recogniser that stands on a pretrained encoder: Whisper's blocks, the upper ones with language experts.

Every expert starts as a copy of the feed-forward part that it replaces, so that at first the model computes what the
pretrained one computed. Two heads: a fresh CTC head, and Whisper's own text decoder.

Letters: B batch, S samples, T frames, D model width, V vocabulary, N packed frames.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from mole_asr.asr.attention_head import AttentionHead
from mole_asr.asr.mixture import ExpertMixture, MixtureConfig, MixtureFeedForward, refuse
from mole_asr.asr.model import ModelOutput
from mole_asr.asr.whisper import (
    WhisperBlock,
    WhisperConfig,
    WhisperEncoder,
    WhisperFeatures,
    WhisperFeedForward,
    whisper_frames,
)
from mole_asr.asr.whisper_checkpoint import load_whisper
from mole_asr.asr.whisper_tokenizer import WhisperTokenizer
from mole_asr.moe.convert import fill_experts
from mole_asr.moe.experts import ExpertWeights
from mole_asr.moe.parts import PartedLinear, log_softmax
from mole_asr.moe.rows import PackedRows


@dataclass(frozen=True)
class PretrainedConfig(MixtureConfig):
    """What is put on a pretrained encoder; see `MixtureConfig` for who chooses experts.

    Attributes:
        checkpoint: Whisper to start from: a folder (Hugging Face, CTranslate2), an OpenAI `.pt`, or a hub id.
        num_mole_blocks: how many encoder blocks, at the top, get experts; 0 leaves the encoder dense.
        language_tokenizer_block: blocks that the language tokenizer listens behind.
        attention_head: whether Whisper's text decoder is kept, beside the CTC head.
    """

    checkpoint: str = ""
    num_mole_blocks: int = 2
    language_tokenizer_block: int = 4
    attention_head: bool = True


class NormalizedCTCHead(nn.Module):
    """BatchNorm without parameters over all valid frames, linear, log-softmax; id 0 is the blank.

    Some channels of a pretrained encoder are hundreds of times as large as others; a head that starts from nothing
    learns in a minute on normalised ones.
    """

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(d_model, affine=False)
        self.linear = PartedLinear(d_model, vocab_size)

    def forward(self, x_BTD: Tensor, rows: PackedRows) -> Tensor:
        """log_probs_BTV in float32; those of padding mean nothing."""
        x_ND = self.norm(rows.pack(x_BTD).float())
        return log_softmax(rows.unpack(self.linear(x_ND)).float(), self.linear.parts)


class PretrainedModel(nn.Module):
    """Features, pretrained encoder with a mixture of experts in its upper blocks, CTC head, attention head.

    Args:
        config: switches.
        whisper: sizes of the checkpoint.
        tokenizer: Whisper's, for the attention head.
        languages: codes.
        vocab_size: V of the CTC head, blank included.
    """

    frame_shift_s = 0.02

    def __init__(
        self,
        config: PretrainedConfig,
        whisper: WhisperConfig,
        tokenizer: WhisperTokenizer,
        languages: list[str],
        vocab_size: int,
    ) -> None:
        super().__init__()
        dense = whisper.encoder_layers - config.num_mole_blocks
        listens = config.language_tokenizer_block
        refuse(
            [
                (dense < 0, f"num_mole_blocks: {config.num_mole_blocks}, but the encoder has {whisper.encoder_layers}"),
                (
                    not 0 <= listens <= dense,
                    f"language_tokenizer_block: {listens} must be 0..{dense}, before the experts",
                ),
            ]
        )
        self.config = config = config.spelled_out(languages)
        self.whisper, self.whisper_tokenizer = whisper, tokenizer
        self.languages, self.vocab_size = list(languages), vocab_size
        self.features = WhisperFeatures(whisper.num_mels)
        self.feature_augment: nn.Module | None = None
        self.encoder = WhisperEncoder(whisper)
        self.mixture = ExpertMixture(config, self.languages, whisper.d_model)
        for block in self.encoder.blocks[dense:]:
            assert isinstance(block, WhisperBlock)
            block.feed_forward = self.mixture.make_layer(whisper.d_ff, "gelu")
        self.ctc = NormalizedCTCHead(whisper.d_model, vocab_size)
        self.attention_head = AttentionHead(whisper, tokenizer, self.languages) if config.attention_head else None

    def language_posterior(self, logits: Tensor) -> Tensor:
        """softmax(z / temperature) over the last dimension, as the router takes it; float32."""
        return self.mixture.language_posterior(logits)

    def forward(
        self,
        audio_BS: Tensor,
        audio_lengths_B: Tensor,
        languages_B: Tensor | None = None,
        true_probability: float = 1.0,
    ) -> ModelOutput:
        """Recognises a padded batch; see `MoleModel.forward`.

        Raises:
            MoleError: an utterance is longer than 30 s.
        """
        features_BTF, frames_B = self.features(audio_BS, audio_lengths_B)
        if self.feature_augment is not None:
            features_BTF = self.feature_augment(features_BTF, frames_B)
        x_BTD, lengths_B = self.encoder.stem(features_BTF, frames_B)
        frames = whisper_frames(lengths_B, x_BTD.shape[1], self.whisper.encoder_heads)
        decision = None
        for index, block in enumerate(self.encoder.blocks):
            if index == self.config.language_tokenizer_block:
                x_BTD, decision = self.mixture(x_BTD, frames, languages_B, true_probability)
            x_BTD = block(x_BTD, frames, decision)
        if decision is None:
            x_BTD, decision = self.mixture(x_BTD, frames, languages_B, true_probability)
        x_BTD = self.encoder.norm(x_BTD)
        return ModelOutput(
            log_probs_BTV=self.ctc(x_BTD, frames.rows),
            lengths_B=lengths_B,
            decision=decision,
            frames=frames,
            memory_BTD=x_BTD,
        )


def from_checkpoint(config: PretrainedConfig, languages: list[str], vocab_size: int) -> PretrainedModel:
    """Builds the model on the checkpoint that the config names: at first it computes what that computes.

    Raises:
        MoleError: the checkpoint cannot be read, or does not fit the config.
    """
    checkpoint = load_whisper(config.checkpoint)
    model = PretrainedModel(config, checkpoint.config, checkpoint.tokenizer, languages, vocab_size)
    encoder = WhisperEncoder(checkpoint.config)
    encoder.load_state_dict(checkpoint.encoder)
    for block, old in zip(model.encoder.blocks, encoder.blocks, strict=True):
        assert isinstance(block, WhisperBlock) and isinstance(old, WhisperBlock)
        if isinstance(block.feed_forward, WhisperFeedForward):
            continue
        dense, layer = old.feed_forward, block.feed_forward
        assert isinstance(dense, WhisperFeedForward) and isinstance(layer, MixtureFeedForward)
        layer.norm.load_state_dict(dense.norm.state_dict())
        fill_experts(layer.moe.experts, ExpertWeights(dense.w1.weight, dense.w1.bias, dense.w2.weight, dense.w2.bias))
        old.feed_forward = layer
    model.encoder = encoder
    if model.attention_head is not None:
        model.attention_head.decoder.load_state_dict(checkpoint.decoder)
    return model
