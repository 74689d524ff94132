"""A recogniser that stands on a pretrained encoder (Whisper, wav2vec 2.0, w2v-BERT 2.0): its upper blocks get experts.

Every expert starts as a copy of the feed-forward part that it replaces, so that at first the model computes what the
pretrained one computed. A fresh CTC head, and for Whisper its own text decoder as a second head.

Letters: B batch, S samples, T frames, D model width, V vocabulary, N packed frames.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.attention_head import AttentionHead
from mole_asr.asr.conformer import Frames
from mole_asr.asr.language_tokenizer import LanguageEvidence
from mole_asr.asr.mixture import Decision, ExpertMixture, MixtureConfig, MixtureFeedForward
from mole_asr.asr.model import ModelOutput
from mole_asr.asr.model_files import CONFIG, find_model, read_json
from mole_asr.asr.pretrained_encoders import TORCHAUDIO, feed_forward_weights, load_pretrained_encoder
from mole_asr.asr.w2v_bert import W2vBertConfig, W2vBertEncoder
from mole_asr.asr.wav2vec2 import Wav2Vec2Config, Wav2Vec2Encoder
from mole_asr.asr.whisper import (
    PretrainedEncoder,
    WhisperBlock,
    WhisperConfig,
    WhisperEncoder,
    WhisperFeatures,
    whisper_frames,
)
from mole_asr.asr.whisper_checkpoint import load_whisper
from mole_asr.asr.whisper_tokenizer import WhisperTokenizer
from mole_asr.audio.read import SAMPLING_RATE_HZ
from mole_asr.moe.convert import fill_experts
from mole_asr.moe.parts import PartedLinear, log_softmax

# Behind each utterance, for Whisper, which hardly ever heard speech that ends with its window. The model of
# recipes/whisper_mole's `prompts5` made 60.1 % of errors on new voices, and 53.4 % with silence in recognition alone.
SILENCE_S = 1.0
# Of what the two witnesses of the language say, where an utterance sounds like none that the language tokenizer knows:
# so much of its own logits, and so much more of the decoder's. recipes/whisper_mole says what that brings.
STRANGER_TRUST, STRANGER_OPINION = 0.3, 1.5
# A second hearing that changes the reliability by no more than this changes the encoder's output too little to compute
# it again.
SAME_RELIABILITY = 0.1


@dataclass(frozen=True)
class PretrainedConfig(MixtureConfig):
    """What is put on a pretrained encoder; see `MixtureConfig` for who chooses experts.

    Attributes:
        checkpoint: what to start from. Whisper: a folder (Hugging Face, CTranslate2), an OpenAI `.pt`, or a hub id;
            wav2vec 2.0, XLS-R, MMS, HuBERT, w2v-BERT 2.0: a Hugging Face folder or hub id, or torchaudio:NAME of a
            bundle.
        num_mole_blocks: how many encoder blocks, at the top, get experts; 0, or the mixture "dense", leaves the encoder
            as it is. Experts are as wide as what they are copies of, so `expert_d_ff` has nothing to say.
        language_tokenizer_block: blocks that the language tokenizer listens behind.
        attention_head: whether Whisper's text decoder is kept, beside the CTC head. Other encoders have none.
        second_hearing: in recognition without a given language, Whisper's text decoder is asked too: its log-
            probabilities of the languages, by this factor, are added to the logits of the language tokenizer, and
            where that changes the decision the upper blocks are computed again. It knows voices and rooms that a small
            corpus lacks; it counts more, and the language tokenizer less, where an utterance sounds like none of the
            examples that the model keeps (`asr/familiarity.py`). 0: it is not asked.
    """

    section: ClassVar[str] = "model.pretrained"

    checkpoint: str = ""
    num_mole_blocks: int = 2
    language_tokenizer_block: int = 4
    attention_head: bool = True
    second_hearing: float = 0.5


class PretrainedCTCHead(nn.Module):
    """BatchNorm without parameters, an encoder block of its own, linear, log-softmax; id 0 is the blank.

    Some channels of a pretrained encoder are hundreds of times as large as others; a head that starts from nothing
    learns in a minute on normalised ones. Whisper's encoder tells its decoder what is said, not in which frame; the
    block finds that out (recipes/whisper_mole says what it brings).

    Args:
        d_model: D of the encoder.
        vocab_size: V, blank included.
        width: of the block.
        num_heads: of its attention.
    """

    def __init__(self, d_model: int, vocab_size: int, width: int = 256, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.input_norm = nn.BatchNorm1d(d_model, affine=False)
        self.input = nn.Linear(d_model, width)
        self.block = WhisperBlock(width, 4 * width, num_heads)
        self.norm = nn.LayerNorm(width)
        self.linear = PartedLinear(width, vocab_size)

    def forward(self, x_BTD: Tensor, lengths_B: Tensor, newest_B: Tensor | None = None) -> Tensor:
        """log_probs_BTV in float32, of the pieces up to a generation or of all; those of padding mean nothing."""
        frames = whisper_frames(lengths_B, x_BTD.shape[1], self.num_heads)
        normal_BTD = frames.rows.unpack(self.input_norm(frames.rows.pack(x_BTD).float()))
        x_BTW = self.norm(self.block(self.input(normal_BTD), frames))
        return log_softmax(self.linear(x_BTW).float(), self.linear.parts, newest_B)


EncoderSizes: TypeAlias = WhisperConfig | Wav2Vec2Config | W2vBertConfig
ENCODERS: dict[str, tuple[type[EncoderSizes], type[PretrainedEncoder]]] = {
    "whisper": (WhisperConfig, WhisperEncoder),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Encoder),
    "w2v_bert": (W2vBertConfig, W2vBertEncoder),
}
"""Name of each kind of encoder in config.json -> its sizes, its module."""


class PretrainedModel(nn.Module):
    """Features, pretrained encoder with a mixture of experts in its upper blocks, CTC head, attention head.

    Args:
        config: switches.
        sizes: of the encoder; their type says which one.
        tokenizer: Whisper's, for the attention head; None for encoders that have no decoder.
        languages: codes.
        vocab_size: V of the CTC head, blank included.
    """

    frame_shift_s = 0.02

    def __init__(
        self,
        config: PretrainedConfig,
        sizes: EncoderSizes,
        tokenizer: WhisperTokenizer | None,
        languages: list[str],
        vocab_size: int,
    ) -> None:
        super().__init__()
        dense = sizes.encoder_layers - config.num_mole_blocks
        listens = config.language_tokenizer_block
        config.refuse(
            [
                (
                    not 0 <= dense <= sizes.encoder_layers,
                    f"num_mole_blocks: {config.num_mole_blocks}, but the encoder has {sizes.encoder_layers}",
                ),
                (
                    config.expert_d_ff not in (None, sizes.d_ff),
                    f"expert_d_ff: {config.expert_d_ff}, but experts are copies of parts of width {sizes.d_ff}",
                ),
                (
                    not 0 <= listens <= dense,
                    f"language_tokenizer_block: {listens} must be 0..{dense}, before the experts",
                ),
                (
                    not 0 <= config.second_hearing < math.inf,
                    f"second_hearing: {config.second_hearing:g} must not be negative",
                ),
            ]
        )
        self.config = config = config.spelled_out(languages)
        self.sizes, self.whisper_tokenizer = sizes, tokenizer
        self.languages, self.vocab_size = list(languages), vocab_size
        self.kind, module = next((kind, module) for kind, (s, module) in ENCODERS.items() if isinstance(sizes, s))
        # The other encoders take waveforms, of any length.
        self.features, self.max_seconds = None, math.inf
        if isinstance(sizes, WhisperConfig):
            self.features = WhisperFeatures(sizes.num_mels)
            self.max_seconds = sizes.max_frames * self.frame_shift_s
        self.feature_augment: nn.Module | None = None
        self.encoder: PretrainedEncoder = module(sizes)
        self.mixture = ExpertMixture(config, self.languages, sizes.d_model)
        for block in list(self.encoder.blocks)[dense:] if config.mixture != "dense" else []:
            block.feed_forward = self.mixture.make_layer(sizes.d_ff, self.encoder.activation)
        self.ctc = PretrainedCTCHead(sizes.d_model, vocab_size)
        self.attention_head: AttentionHead | None = None
        if config.attention_head and tokenizer is not None and isinstance(sizes, WhisperConfig):
            self.attention_head = AttentionHead(sizes, tokenizer, self.languages)

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
        if self.features is None:
            x_BTD, lengths_B = self.encoder.stem(audio_BS, audio_lengths_B)
        else:
            features_BTF, frames_B = self.features(*self._with_silence(audio_BS, audio_lengths_B))
            if self.feature_augment is not None:
                features_BTF = self.feature_augment(features_BTF, frames_B)
            x_BTD, lengths_B = self.encoder.stem(features_BTF, frames_B)
        frames = self.encoder.frames(lengths_B, x_BTD.shape[1])
        for block in self.encoder.blocks[: self.config.language_tokenizer_block]:
            x_BTD = block(x_BTD, frames, None)
        evidence = self.mixture.hear(x_BTD, frames)
        decision = self.mixture.decide(evidence, frames, languages_B, true_probability)
        memory_BTD = self._upper(x_BTD, frames, decision)
        head = self.attention_head
        if head is not None and languages_B is None and not self.training and self.config.second_hearing:
            opinion_BN = head.language_opinion(memory_BTD, frames.lengths_B, self.mixture.languages)
            evidence = self._joined(evidence, opinion_BN, frames, decision)
            memory_BTD, decision = self._hear_again(x_BTD, frames, memory_BTD, evidence, decision)
        speech_B = lengths_B
        if self.features is not None:  # the CTC head does not hear the silence: it would learn to write nothing
            speech_B = -(-audio_lengths_B // round(self.frame_shift_s * SAMPLING_RATE_HZ))
        return ModelOutput(
            log_probs_BTV=self.ctc(memory_BTD, speech_B, decision.newest_B),
            lengths_B=speech_B,
            decision=decision,
            frames=frames,
            memory_BTD=memory_BTD,
        )

    def _with_silence(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms with `SILENCE_S` behind them, as far as the model hears; what is too long stays so."""
        end = round(self.max_seconds * SAMPLING_RATE_HZ)
        longer_B = (lengths_B + round(SILENCE_S * SAMPLING_RATE_HZ)).clamp(max=end).maximum(lengths_B)
        missing = max(0, int(longer_B.max()) - audio_BS.shape[1])
        return functional.pad(audio_BS, (0, missing)), longer_B

    def _joined(
        self, evidence: LanguageEvidence, opinion_BN: Tensor, frames: Frames, first: Decision
    ) -> LanguageEvidence:
        """What the language tokenizer heard, and the text decoder's log-probabilities of the languages.

        Of voices that are strange to the language tokenizer, it counts less, and the text decoder more.
        """
        familiar_B = self.mixture.sounds_familiar(evidence, frames, first.newest_B)
        trust_B = torch.where(familiar_B, 1.0, STRANGER_TRUST)
        weight_B = self.config.second_hearing * torch.where(familiar_B, 1.0, STRANGER_OPINION)
        return evidence.joined(trust_B, weight_B[:, None] * opinion_BN, frames.valid_BT)

    def _hear_again(
        self, x_BTD: Tensor, frames: Frames, memory_BTD: Tensor, evidence: LanguageEvidence, first: Decision
    ) -> tuple[Tensor, Decision]:
        """Decides once more, by the evidence of both; what that changes is computed again.

        Of most utterances it changes neither the language nor, by more than `SAME_RELIABILITY`, the reliability; the
        upper blocks of these, with their experts, are a fifth of the work.

        Args:
            x_BTD: the stream behind the language tokenizer.
            frames: of the batch.
            memory_BTD: what the encoder gives after the first hearing.
            evidence: of both.
            first: the decision by the language tokenizer alone.

        Returns:
            What the encoder gives, and the decision; its plans are those of the first hearing.
        """
        second = self.mixture.decide(evidence, frames)
        changed_R = second.departs_from(first, SAME_RELIABILITY).nonzero()[:, 0]
        if len(changed_R):
            some = self.encoder.frames(frames.lengths_B[changed_R], x_BTD.shape[1])
            decision = self.mixture.decide(evidence.rows(changed_R), some)
            memory_BTD = memory_BTD.index_copy(0, changed_R, self._upper(x_BTD[changed_R], some, decision))
        return memory_BTD, replace(second, plans=first.plans)

    def _upper(self, x_BTD: Tensor, frames: Frames, decision: Decision) -> Tensor:
        """What the encoder gives: the blocks behind the language tokenizer, and the last norm."""
        x_BTD = self.mixture.add_language(x_BTD, decision)
        for block in self.encoder.blocks[self.config.language_tokenizer_block :]:
            x_BTD = block(x_BTD, frames, decision)
        return self.encoder.norm(x_BTD)


def from_checkpoint(config: PretrainedConfig, languages: list[str], vocab_size: int) -> PretrainedModel:
    """Builds the model on the checkpoint that the config names: at first it computes what that computes.

    But for routers that take one expert with its raw weight (`top_k: 1` of "switch", "omni" and "group"): these start
    weaker.

    Raises:
        MoleError: the checkpoint cannot be read, or does not fit the config.
    """
    config.refuse([(not config.checkpoint, "checkpoint: names nothing to start from")])
    encoder: PretrainedEncoder
    if not _is_whisper(config.checkpoint):
        encoder = load_pretrained_encoder(config.checkpoint)
        model = PretrainedModel(config, encoder.config, None, languages, vocab_size)
    else:
        checkpoint = load_whisper(config.checkpoint)
        encoder = WhisperEncoder(checkpoint.config)
        encoder.load_state_dict(checkpoint.encoder)
        model = PretrainedModel(config, checkpoint.config, checkpoint.tokenizer, languages, vocab_size)
        if model.attention_head is not None:
            model.attention_head.decoder.load_state_dict(checkpoint.decoder)
    for block, old in zip(model.encoder.blocks, encoder.blocks, strict=True):
        layer = block.feed_forward
        if isinstance(layer, MixtureFeedForward):
            norm, dense = feed_forward_weights(old)
            layer.norm.load_state_dict(norm.state_dict())
            fill_experts(layer.moe.experts, dense)
            old.feed_forward = layer
    model.encoder = encoder
    if model.mixture.language_embedding is not None:
        nn.init.zeros_(model.mixture.language_embedding.weight)
    return model


def _is_whisper(checkpoint: str) -> bool:
    """Whether a checkpoint is a Whisper model, or else an encoder by itself."""
    path = Path(checkpoint)
    if checkpoint.startswith(TORCHAUDIO) or path.is_file() or (path / "model.bin").exists():
        return not checkpoint.startswith(TORCHAUDIO)
    folder = find_model(checkpoint, (CONFIG,), weights=(CONFIG,))
    return read_json(folder / CONFIG).get("model_type", "whisper") == "whisper"  # CTranslate2 writes none
