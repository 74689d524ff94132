"""The language model: token ids to logits. A transformer whose feed-forward parts are dense or mixtures of experts.

A batch is B windows of T tokens, each of one language: the sentences of a language stand one after the other with a
separator between them, and attention sees the whole window, across separators. Nothing is padded but the last window of
a text that is scored, at its end.

Letters: B windows, T tokens, S tokens with those of the cache, N valid tokens, D model width, H heads, C width of a
head (D / H), F feed-forward width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.errors import MoleError
from mole_asr.moe.experts import GATED, Activation, ExpertWeights, feed_forward
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.routers import Router, RoutingContext
from mole_asr.moe.rows import PackedRows
from mole_asr.text.policies import ExpertsConfig, by_layer, make_layer

Norm = Literal["rms", "layer"]


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the transformer; no linear map has a bias.

    Attributes:
        d_model: D.
        d_ff: F, of the dense feed-forward parts, and of each expert if `experts.expert_d_ff` does not say.
        num_layers: transformer layers.
        num_heads: attention heads.
        causal: whether a token sees only those before it (a decoder, trained on the next token), or all (an encoder,
            trained on masked tokens).
        activation: "relu", "gelu", "silu", or gated: "swiglu", "reglu", "geglu"; of the dense parts and of the experts.
        norm: "rms" or "layer", before each part of a layer and before the logits.
        dropout: of the embedding and of each part of a layer.
        rotary_base: slowest turn of the rotary positions, in tokens a radian.
    """

    d_model: int = 192
    d_ff: int = 512
    num_layers: int = 4
    num_heads: int = 3
    causal: bool = True
    activation: Activation = "swiglu"
    norm: Norm = "rms"
    dropout: float = 0.0
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            MoleError: one is wrong; the message names it.
        """
        for name in ("d_model", "d_ff", "num_layers", "num_heads", "rotary_base"):
            if getattr(self, name) <= 0:
                raise MoleError(f"model.network.{name}: {getattr(self, name):g} must be positive")
        if self.d_model % (2 * self.num_heads):
            raise MoleError(f"model.network.d_model: {self.d_model} is no multiple of twice num_heads {self.num_heads}")
        if not 0 <= self.dropout < 1:
            raise MoleError(f"model.network.dropout: {self.dropout:g} must be from 0 to below 1")
        if self.activation not in get_args(Activation):
            raise MoleError(f"model.network.activation: {self.activation!r} is unknown")


def rotary_angles(positions_T: Tensor, width: int, base: float) -> Tensor:
    """Angles [T, C / 2] by which pair i is turned at position m: m / base^(2 i / C), float32 (Su et al., 2021).

    Args:
        positions_T: m; more axes before T are kept.
        width: C, even.
        base: the slowest turn, in tokens a radian.
    """
    turns = base ** (-torch.arange(0, width, 2, device=positions_T.device, dtype=torch.float32) / width)
    return positions_T.float()[..., None] * turns


def rotate(x_BHTC: Tensor, cosine_TC: Tensor, sine_TC: Tensor) -> Tensor:
    """Turns each pair (i, i + C / 2) by its angle, the pairs of Llama's checkpoints; in the type of x."""
    first, second = x_BHTC.chunk(2, dim=-1)
    return (x_BHTC * cosine_TC + torch.cat([-second, first], dim=-1) * sine_TC).to(x_BHTC.dtype)


class KeyValueCache:
    """Keys and values of the tokens so far, of each layer; a decoder reads on from there.

    Attributes:
        keys: a layer [B, H, S, C], turned to their positions.
        values: a layer [B, H, S, C].
    """

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """S, the tokens so far."""
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, layer: int, keys_BHTC: Tensor, values_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Appends those of new tokens and returns all."""
        if layer in self.keys:
            keys_BHTC = torch.cat([self.keys[layer], keys_BHTC], dim=2)
            values_BHTC = torch.cat([self.values[layer], values_BHTC], dim=2)
        self.keys[layer], self.values[layer] = keys_BHTC, values_BHTC
        return keys_BHTC, values_BHTC

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Where new tokens stand, int64 [T]; [B, 1, T] in a cache whose rows differ in length."""
        return torch.arange(len(self), len(self) + count, device=device)

    def mask(self, count: int, device: torch.device) -> Tensor | None:
        """Where new tokens may look, bool, [T, S + T] or [B, 1, T, S + T]; None: at all up to themselves."""
        if count == 1 or not len(self):
            return None
        return torch.ones(count, len(self) + count, dtype=torch.bool, device=device).tril(len(self))

    def select(self, rows_B: Tensor) -> "KeyValueCache":
        """A cache of these rows of the batch, in this order: for a beam that goes on from some of its hypotheses."""
        chosen = KeyValueCache()
        chosen.keys = {layer: keys[rows_B] for layer, keys in self.keys.items()}
        chosen.values = {layer: values[rows_B] for layer, values in self.values.items()}
        return chosen


@dataclass(frozen=True, eq=False)
class Tokens:
    """What all layers need to know of a batch, worked out once.

    Attributes:
        cosine_TC: of the rotary angles; [B, 1, T, C] where the rows of a cache differ in length.
        sine_TC: of the rotary angles.
        rows: the packing of the valid tokens.
        context: for routers.
        mask: bool, true where attention may look; None where `is_causal` says it all.
        is_causal: each token sees those up to itself.
        cache: of the tokens before, or None.
    """

    cosine_TC: Tensor
    sine_TC: Tensor
    rows: PackedRows
    context: RoutingContext
    mask: Tensor | None
    is_causal: bool
    cache: KeyValueCache | None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt C) V [B, H, T, C], by torch's fused kernel but where that is slow.

    Args:
        query: [B, H, T, C].
        key: [B, H, S, C].
        value: [B, H, S, C].
        mask: bool, true where attention may look; None: everywhere.
        is_causal: each token sees those up to itself, instead of a mask.
    """
    in_bfloat16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not (in_bfloat16 and query.requires_grad):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    # On a CPU the backward of the fused kernel takes three times as long in bfloat16 as these products (windows of 128
    # or 256 tokens, 32 or 16 of them, heads of 64).
    if is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scores_BHTS = (query * query.shape[-1] ** -0.5) @ key.mT
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
    return scores_BHTS.softmax(-1).to(value.dtype) @ value


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, d_model: int, num_heads: int, layer: int) -> None:
        super().__init__()
        self.num_heads, self.layer = num_heads, layer
        self.query_key_value = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Mixes the tokens of a window."""
        B, T, D = x_BTD.shape
        heads = self.query_key_value(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        query = rotate(query, tokens.cosine_TC, tokens.sine_TC)
        key = rotate(key, tokens.cosine_TC, tokens.sine_TC)
        if tokens.cache is not None:
            key, value = tokens.cache.extend(self.layer, key, value)
        mixed_BHTC = attend(query, key, value, tokens.mask, tokens.is_causal)
        return self.output(mixed_BHTC.transpose(1, 2).reshape(B, T, D))


class DenseFeedForward(nn.Module):
    """D -> F -> D; with a gated activation the first matrix has 2F rows, gate first, as an expert has."""

    def __init__(self, d_model: int, d_ff: int, activation: Activation) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = nn.Linear(d_model, 2 * d_ff if activation in GATED else d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def weights(self) -> ExpertWeights:
        """Its tensors, as those of one expert."""
        return ExpertWeights(self.up.weight, None, self.down.weight, None)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Computes every token."""
        return feed_forward(x_BTD, self.weights(), self.activation)


class TransformerLayer(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x).

    Attributes:
        feed_forward: a `DenseFeedForward`, or a `MoELayer`.
    """

    def __init__(self, config: NetworkConfig, layer: int, feed_forward: DenseFeedForward | MoELayer) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config.d_model, config.num_heads, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, RoutingPlan | None]:
        """The stream behind this layer, and the plan of its experts if it has any."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), tokens))
        normed_BTD, plan = self.feed_forward_norm(x_BTD), None
        if isinstance(self.feed_forward, MoELayer):
            y_BTD, plan = self.feed_forward(normed_BTD, rows=tokens.rows, context=tokens.context)
        else:
            y_BTD = self.feed_forward(normed_BTD)
        return x_BTD + self.dropout(y_BTD), plan


def make_norm(config: NetworkConfig) -> nn.Module:
    """The configured normalisation."""
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, bias=False)
    return nn.RMSNorm(config.d_model, eps=1e-6)


@dataclass(frozen=True, eq=False)
class TextOutput:
    """What one forward gives.

    Attributes:
        logits_BTV: of the next token (of the token itself for an encoder), in the type of the products.
        rows: the packing of the valid tokens, which the plans are for.
        plans: of each layer that has experts, by its place.
    """

    logits_BTV: Tensor
    rows: PackedRows
    plans: dict[int, RoutingPlan] = field(default_factory=dict)


class TextModel(nn.Module):
    """Embedding, transformer layers, norm, logits by the same embedding.

    Args:
        config: sizes.
        experts: which layers have experts, and who chooses them; each config is for layers of its own.
        languages: codes, as labels index them.
        vocab_size: V.

    Attributes:
        policies: the config of each layer that has experts, by its place.

    Raises:
        MoleError: the experts do not fit the sizes, the languages or each other.
    """

    def __init__(
        self, config: NetworkConfig, experts: Sequence[ExpertsConfig], languages: list[str], vocab_size: int
    ) -> None:
        super().__init__()
        self.config, self.experts = config, [each.spelled_out(languages) for each in experts]
        self.policies = by_layer(self.experts, config.num_layers)
        if config.causal and any(policy.policy == "expert_choice" for policy in self.policies.values()):
            raise MoleError(
                "experts.policy: with expert_choice a decoder would see what is to come; "
                "give another, or model.network.causal false"
            )
        self.languages, self.vocab_size = list(languages), vocab_size
        D = config.d_model
        self.embedding = nn.Embedding(vocab_size, D)
        # Larger than usual: as logits begin at about 1, a short training on few texts gets further (in a trial of 120
        # steps on English bytes 3.4 bits a byte, with 0.02 3.7), and routers see tokens that differ.
        nn.init.normal_(self.embedding.weight, std=D**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            TransformerLayer(config, layer, self._feed_forward(layer)) for layer in range(config.num_layers)
        )
        self._share_routers()
        self.norm = make_norm(config)

    def _feed_forward(self, layer: int) -> DenseFeedForward | MoELayer:
        D, F, activation = self.config.d_model, self.config.d_ff, self.config.activation
        if layer not in self.policies:
            return DenseFeedForward(D, F, activation)
        return make_layer(self.policies[layer], D, F, activation, self.languages)

    @property
    def num_experts(self) -> dict[int, int]:
        """Of each layer that has experts, by its place."""
        parts = {layer: block.feed_forward for layer, block in enumerate(self.blocks)}  # cut ones have no policy
        return {layer: part.experts.num_experts for layer, part in parts.items() if isinstance(part, MoELayer)}

    def _share_routers(self) -> None:
        """Gives layers of one config the router of the first of them, where the config says so."""
        first: dict[int, Router | None] = {}
        for layer, policy in self.policies.items():
            part = self.blocks[layer].feed_forward
            if policy.share_router and isinstance(part, MoELayer):
                part.router = first.setdefault(self.experts.index(policy), part.router)

    def forward(
        self,
        ids_BT: Tensor,
        lengths_B: Tensor | None = None,
        languages_B: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> TextOutput:
        """Reads a batch.

        Args:
            ids_BT: int64 token ids.
            lengths_B: int64 valid tokens, where windows are padded at the end.
            languages_B: int64 language of each window, -1 where unknown; the policy "forced" looks at it in training.
            cache: of the tokens before these, for a decoder; it is extended by these.
        """
        tokens = self._describe(ids_BT, lengths_B, languages_B, cache)
        x_BTD = self.dropout(self.embedding(ids_BT))
        plans: dict[int, RoutingPlan] = {}
        for layer, block in enumerate(self.blocks):
            x_BTD, plan = block(x_BTD, tokens)
            if plan is not None:
                plans[layer] = plan
        return TextOutput(functional.linear(self.norm(x_BTD), self.embedding.weight), tokens.rows, plans)

    def _describe(
        self, ids_BT: Tensor, lengths_B: Tensor | None, languages_B: Tensor | None, cache: KeyValueCache | None
    ) -> Tokens:
        B, T = ids_BT.shape
        device, past = ids_BT.device, 0 if cache is None else len(cache)
        positions_T = torch.arange(T, device=device) if cache is None else cache.positions(T, device)
        if cache is not None and (lengths_B is not None or not self.config.causal):
            raise ValueError("a cache is for decoders, and for windows without padding")
        if lengths_B is None:
            rows = PackedRows(torch.full((B,), T, device=device), T, None, torch.arange(B + 1, device=device) * T)
        else:
            rows = PackedRows.from_lengths(lengths_B, T)
        width = self.config.d_model // self.config.num_heads
        angles = rotary_angles(positions_T, width, self.config.rotary_base)
        angles_TC = torch.cat([angles, angles], dim=-1).to(
            torch.promote_types(self.embedding.weight.dtype, angles.dtype)
        )
        mask = None if cache is None else cache.mask(T, device)
        if not self.config.causal and rows.index_N is not None:
            mask = (torch.arange(T, device=device) < rows.lengths_B[:, None])[:, None, None, :]
        # Padding stands at the end, where no valid token of a decoder looks.
        is_causal = self.config.causal and not past and mask is None
        context = RoutingContext(rows, languages_B=languages_B)
        return Tokens(angles_TC.cos(), angles_TC.sin(), rows, context, mask, is_causal, cache)
