"""Whisper's text decoder (Radford et al., 2022): a Transformer that attends to the valid frames of the encoder.

Letters: B batch, U tokens, T encoder frames, D model width, H heads, G = B x H, W width of a head (D / H),
V vocabulary, L blocks, P places in a cache, R drafts of all utterances (a draft for each in training), S = R x H.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.attention import MASKED, SelfAttention, attend, key_mask_bias, merge_heads, split_heads
from mole_asr.asr.whisper import WhisperConfig, WhisperFeedForward
from mole_asr.audio.features import valid_mask
from mole_asr.errors import MoleError
from mole_asr.moe.experts import compute_dtype

CACHE_BLOCK = 32  # places that a cache grows by


@dataclass
class DecoderCache:
    """Keys and values of a batch that is being decoded; every draft has read the same number of tokens.

    Each utterance has the same number of drafts, one behind the other; they share its encoder frames.

    Attributes:
        num_heads: H.
        length: tokens read.
        self_LSPW: keys and values of the tokens read, a pair a block, with room for more (in float32, or bfloat16
            under its autocast).
        cross_LGTW: keys and values of the encoder's frames, a pair a block.
        bias_G1T: MASKED at padded encoder frames.
    """

    num_heads: int
    length: int
    self_LSPW: list[tuple[Tensor, Tensor]]
    cross_LGTW: list[tuple[Tensor, Tensor]]
    bias_G1T: Tensor

    def select(self, drafts: Tensor, utterances: Tensor | None = None) -> None:
        """Keeps some of the drafts (int64 indices), in a new order or several times, or without the finished.

        Block after block is replaced, so that no second cache takes memory.

        Args:
            drafts: of the utterances that are left.
            utterances: those that are left; None: all.
        """
        index_S = self._heads_of(drafts)
        for block, (key_SPW, value_SPW) in enumerate(self.self_LSPW):
            self.self_LSPW[block] = key_SPW[index_S], value_SPW[index_S]
        if utterances is not None:
            index_G = self._heads_of(utterances)
            for block, (key_GTW, value_GTW) in enumerate(self.cross_LGTW):
                self.cross_LGTW[block] = key_GTW[index_G], value_GTW[index_G]
            self.bias_G1T = self.bias_G1T[index_G]

    def _heads_of(self, rows: Tensor) -> Tensor:
        return (rows[:, None] * self.num_heads + torch.arange(self.num_heads, device=rows.device)).flatten()

    def places(self, num_tokens: int) -> int:
        """P, room for the tokens read and so many new ones."""
        return -(-(self.length + num_tokens) // CACHE_BLOCK) * CACHE_BLOCK

    def append(self, block: int, key_SUW: Tensor, value_SUW: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of new tokens (behind `length`); returns all places, those behind are zero.

        Products with a part of the places would copy that part first; whole, and masked, they do not.
        """
        end = self.length + key_SUW.shape[1]
        key_SPW, value_SPW = self.self_LSPW[block] if self.length else (key_SUW[:, :0], value_SUW[:, :0])
        room = self.places(key_SUW.shape[1]) - key_SPW.shape[1]
        if room:
            key_SPW, value_SPW = (functional.pad(part, (0, 0, 0, room)) for part in (key_SPW, value_SPW))
            self.self_LSPW[block] = (key_SPW, value_SPW)
        key_SPW[:, self.length : end] = key_SUW
        value_SPW[:, self.length : end] = value_SUW
        return key_SPW, value_SPW


class CrossAttention(nn.Module):
    """LayerNorm, then multi-head attention to the encoder's frames."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(d_model)
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.output = nn.Linear(d_model, d_model)

    def keys_values(self, memory_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's frames: [G, T, W] each."""
        key_GTW, value_GTW = split_heads(self.key_value(memory_BTD), 2, self.num_heads)
        return key_GTW, value_GTW

    def forward(self, x_BUD: Tensor, key_GTW: Tensor, value_GTW: Tensor, bias_G1T: Tensor) -> Tensor:
        """Attends to frames; `bias_G1T` masks padding."""
        (query_GUW,) = split_heads(self.query(self.norm(x_BUD)), 1, self.num_heads)
        return self.output(merge_heads(attend(query_GUW, key_GTW, value_GTW, bias_G1T), self.num_heads))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder, feed-forward."""

    def __init__(self, d_model: int, d_ff: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SelfAttention(d_model, num_heads)
        self.cross_attention = CrossAttention(d_model, num_heads)
        self.feed_forward = WhisperFeedForward(d_model, d_ff)

    def forward(self, x_BUD: Tensor, bias_1UU: Tensor, memory_BTD: Tensor, bias_G1T: Tensor) -> Tensor:
        """Transforms all tokens at once, for training."""
        bias_GUU = bias_1UU.expand(len(bias_G1T), -1, -1)
        x_BUD = x_BUD + self.attention(x_BUD, bias_GUU)
        x_BUD = x_BUD + self.cross_attention(x_BUD, *self.cross_attention.keys_values(memory_BTD), bias_G1T)
        return x_BUD + self.feed_forward(x_BUD)

    def read(self, x_RUD: Tensor, bias_1UP: Tensor, cache: DecoderCache, block: int) -> Tensor:
        """Transforms the next tokens, with the cache of block number `block`."""
        H = cache.num_heads
        query_SUW, key_SUW, value_SUW = split_heads(self.attention.query_key_value(self.attention.norm(x_RUD)), 3, H)
        key_SPW, value_SPW = cache.append(block, key_SUW, value_SUW)
        bias_SUP = bias_1UP.expand(len(query_SUW), -1, -1)
        mixed_RUD = merge_heads(attend(query_SUW, key_SPW, value_SPW, bias_SUP), H)
        x_RUD = x_RUD + self.attention.output(mixed_RUD)
        # To the frames, the drafts of an utterance are but more tokens: its keys and values need no copies.
        x_BUD = x_RUD.reshape(len(cache.bias_G1T) // H, -1, x_RUD.shape[2])
        x_RUD = x_RUD + self.cross_attention(x_BUD, *cache.cross_LGTW[block], cache.bias_G1T).view_as(x_RUD)
        return x_RUD + self.feed_forward(x_RUD)


class WhisperDecoder(nn.Module):
    """Embedding with learned positions, blocks, LayerNorm, and the embedding again as output layer."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions_UD = nn.Parameter(torch.zeros(config.max_tokens, config.d_model))
        self.blocks = nn.ModuleList(
            DecoderBlock(config.d_model, config.d_ff, config.decoder_heads) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, tokens_BU: Tensor, memory_BTD: Tensor, memory_lengths_B: Tensor) -> Tensor:
        """Predicts the token after each token, for training: logits_BUV, float32. See `states`."""
        return self.logits(self.states(tokens_BU, memory_BTD, memory_lengths_B))

    def states(self, tokens_BU: Tensor, memory_BTD: Tensor, memory_lengths_B: Tensor) -> Tensor:
        """States behind each token, for training; `logits` of some or all of them predict the next token.

        Args:
            tokens_BU: int64; padding at the end does not reach what stands before it.
            memory_BTD: the encoder's output.
            memory_lengths_B: int64, its valid frames.

        Returns:
            x_BUD, before the last LayerNorm.

        Raises:
            MoleError: more tokens than positions.
        """
        x_BUD = self._embed(tokens_BU, 0)
        bias_1UU = self._causal(tokens_BU.shape[1], 0, tokens_BU.shape[1], x_BUD)
        bias_G1T = key_mask_bias(valid_mask(memory_lengths_B, memory_BTD.shape[1]), self.config.decoder_heads)
        for block in self.blocks:
            x_BUD = block(x_BUD, bias_1UU, memory_BTD, bias_G1T)
        return x_BUD

    def logits(self, x_ND: Tensor) -> Tensor:
        """float32 scores [..., V] of the next token, from states [..., D]. V is large: leave out states unneeded."""
        return functional.linear(self.norm(x_ND), self.embedding.weight).float()

    def cross_cache(self, memory_BTD: Tensor, memory_lengths_B: Tensor) -> DecoderCache:
        """Starts decoding: the cross-attention's keys and values are computed here, once."""
        bias_G1T = key_mask_bias(valid_mask(memory_lengths_B, memory_BTD.shape[1]), self.config.decoder_heads)
        cross = [block.cross_attention.keys_values(memory_BTD) for block in self._blocks()]
        empty = memory_BTD.new_empty(0)
        return DecoderCache(self.config.decoder_heads, 0, [(empty, empty)] * len(cross), cross, bias_G1T)

    def read(self, tokens_RU: Tensor, cache: DecoderCache) -> Tensor:
        """Reads the next tokens of all drafts, such as a prompt, into the cache.

        Returns:
            logits_RV, float32, of the token after the last.

        Raises:
            MoleError: more tokens than positions.
        """
        x_RUD = self._embed(tokens_RU, cache.length)
        num_tokens = tokens_RU.shape[1]
        bias_1UP = self._causal(num_tokens, cache.length, cache.places(num_tokens), x_RUD)
        for i, block in enumerate(self._blocks()):
            x_RUD = block.read(x_RUD, bias_1UP, cache, i)
        cache.length += num_tokens
        return self.logits(x_RUD[:, -1])

    def _blocks(self) -> Iterator[DecoderBlock]:
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            yield block

    def _embed(self, tokens_BU: Tensor, start: int) -> Tensor:
        end, limit = start + tokens_BU.shape[1], len(self.positions_UD)
        if end > limit:
            raise MoleError(f"a text of {end} tokens, but Whisper's decoder ends at {limit}; cut the utterance")
        return self.embedding(tokens_BU) + self.positions_UD[start:end]

    @staticmethod
    def _causal(num_tokens: int, start: int, places: int, like: Tensor) -> Tensor:
        """MASKED where a token would see a later one: [1, U, P], in the type of matrix products."""
        bias_UP = torch.full((num_tokens, places), MASKED, dtype=compute_dtype(like), device=like.device)
        return bias_UP.triu_(start + 1)[None]
