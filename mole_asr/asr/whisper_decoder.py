"""Whisper's text decoder (Radford et al., 2022): a Transformer that attends to the valid frames of the encoder.

Letters: B batch, U tokens, T encoder frames, D model width, H heads, G = B x H, W width of a head (D / H),
V vocabulary, L blocks, P places in a cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.conformer import MASKED
from mole_asr.asr.whisper import (
    WhisperConfig,
    WhisperFeedForward,
    WhisperSelfAttention,
    attend,
    key_mask_bias,
    merge_heads,
    split_heads,
)
from mole_asr.audio.features import valid_mask
from mole_asr.errors import MoleError

CACHE_BLOCK = 32  # places that a cache grows by


@dataclass
class DecoderCache:
    """Keys and values of a batch that is being decoded; every row has read the same number of tokens.

    Attributes:
        num_heads: H.
        length: tokens read.
        self_LGPW: keys and values of the tokens read, a pair a block, with room for more (in float32, or bfloat16
            under its autocast).
        cross_LGTW: keys and values of the encoder's frames, a pair a block.
        bias_G1T: MASKED at padded encoder frames.
    """

    num_heads: int
    length: int
    self_LGPW: list[tuple[Tensor, Tensor]]
    cross_LGTW: list[tuple[Tensor, Tensor]]
    bias_G1T: Tensor

    def select(self, rows: Tensor) -> "DecoderCache":
        """The cache of some rows of the batch (int64 indices): drops finished rows, or reorders beams."""
        head_H = torch.arange(self.num_heads, device=rows.device)
        index_G = (rows[:, None] * self.num_heads + head_H).flatten()
        return DecoderCache(
            self.num_heads,
            self.length,
            [(key[index_G], value[index_G]) for key, value in self.self_LGPW],
            [(key[index_G], value[index_G]) for key, value in self.cross_LGTW],
            self.bias_G1T[index_G],
        )

    def places(self, num_tokens: int) -> int:
        """P, room for the tokens read and so many new ones."""
        return -(-(self.length + num_tokens) // CACHE_BLOCK) * CACHE_BLOCK

    def append(self, block: int, key_GUW: Tensor, value_GUW: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of new tokens (behind `length`); returns all places, those behind are zero.

        Products with a part of the places would copy that part first; whole, and masked, they do not.
        """
        end = self.length + key_GUW.shape[1]
        key_GPW, value_GPW = self.self_LGPW[block] if self.length else (key_GUW[:, :0], value_GUW[:, :0])
        room = self.places(key_GUW.shape[1]) - key_GPW.shape[1]
        if room:
            key_GPW, value_GPW = (functional.pad(part, (0, 0, 0, room)) for part in (key_GPW, value_GPW))
            self.self_LGPW[block] = (key_GPW, value_GPW)
        key_GPW[:, self.length : end] = key_GUW
        value_GPW[:, self.length : end] = value_GUW
        return key_GPW, value_GPW


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
        self.attention = WhisperSelfAttention(d_model, num_heads)
        self.cross_attention = CrossAttention(d_model, num_heads)
        self.feed_forward = WhisperFeedForward(d_model, d_ff)

    def forward(self, x_BUD: Tensor, bias_1UU: Tensor, memory_BTD: Tensor, bias_G1T: Tensor) -> Tensor:
        """Transforms all tokens at once, for training."""
        bias_GUU = bias_1UU.expand(len(bias_G1T), -1, -1)
        x_BUD = x_BUD + self.attention(x_BUD, bias_GUU)
        x_BUD = x_BUD + self.cross_attention(x_BUD, *self.cross_attention.keys_values(memory_BTD), bias_G1T)
        return x_BUD + self.feed_forward(x_BUD)

    def read(self, x_BUD: Tensor, bias_1UP: Tensor, cache: DecoderCache, block: int) -> Tensor:
        """Transforms the next tokens, with the cache of block number `block`."""
        H = cache.num_heads
        query_GUW, key_GUW, value_GUW = split_heads(self.attention.query_key_value(self.attention.norm(x_BUD)), 3, H)
        key_GPW, value_GPW = cache.append(block, key_GUW, value_GUW)
        bias_GUP = bias_1UP.expand(len(query_GUW), -1, -1)
        mixed_BUD = merge_heads(attend(query_GUW, key_GPW, value_GPW, bias_GUP), H)
        x_BUD = x_BUD + self.attention.output(mixed_BUD)
        x_BUD = x_BUD + self.cross_attention(x_BUD, *cache.cross_LGTW[block], cache.bias_G1T)
        return x_BUD + self.feed_forward(x_BUD)


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

    def read(self, tokens_BU: Tensor, cache: DecoderCache) -> Tensor:
        """Reads the next tokens of all rows, such as a prompt, into the cache.

        Returns:
            logits_BV, float32, of the token after the last.

        Raises:
            MoleError: more tokens than positions.
        """
        x_BUD = self._embed(tokens_BU, cache.length)
        num_tokens = tokens_BU.shape[1]
        bias_1UP = self._causal(num_tokens, cache.length, cache.places(num_tokens), x_BUD)
        for i, block in enumerate(self._blocks()):
            x_BUD = block.read(x_BUD, bias_1UP, cache, i)
        cache.length += num_tokens
        return self.logits(x_BUD[:, -1])

    def step(self, token_B: Tensor, cache: DecoderCache) -> Tensor:
        """Reads one token of each row: logits_BV, float32, of the next."""
        return self.read(token_B[:, None], cache)

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
        dtype = like.dtype
        if torch.is_autocast_enabled(like.device.type):
            dtype = torch.get_autocast_dtype(like.device.type)
        bias_UP = torch.full((num_tokens, places), MASKED, dtype=dtype, device=like.device)
        return bias_UP.triu_(start + 1)[None]
