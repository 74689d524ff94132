"""The names that Whisper's checkpoint formats have for the tensors of our encoder and decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mole_asr.asr.model_files import Tensors


@dataclass(frozen=True)
class Layout:
    """One format. Names of parts are given without "weight" and "bias"; several names are stacked into one of ours.

    Attributes:
        block: how the names of a block start behind "encoder." or "decoder."; {} is its number.
        block_parts: our parts of a block.
        cross_parts: our parts of a decoder's block beside those.
        encoder: our other parts of the encoder; the stem's are convolutions.
        decoder: our other parts of the decoder, but for the tables below.
        encoder_positions: whole name of the table.
        decoder_positions: whole name of the table.
        embedding: whole name of the table.
    """

    block: str
    block_parts: dict[str, list[str]]
    cross_parts: dict[str, list[str]]
    encoder: dict[str, str]
    decoder: dict[str, str]
    encoder_positions: str
    decoder_positions: str
    embedding: str


HUGGING_FACE = Layout(
    block="layers.{}.",
    block_parts={
        "attention.norm": ["self_attn_layer_norm"],
        "attention.query_key_value": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.output": ["self_attn.out_proj"],
        "feed_forward.norm": ["final_layer_norm"],
        "feed_forward.w1": ["fc1"],
        "feed_forward.w2": ["fc2"],
    },
    cross_parts={
        "cross_attention.norm": ["encoder_attn_layer_norm"],
        "cross_attention.query": ["encoder_attn.q_proj"],
        "cross_attention.key_value": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
        "cross_attention.output": ["encoder_attn.out_proj"],
    },
    encoder={"stem.first": "encoder.conv1", "stem.second": "encoder.conv2", "norm": "encoder.layer_norm"},
    decoder={"norm": "decoder.layer_norm"},
    encoder_positions="encoder.embed_positions.weight",
    decoder_positions="decoder.embed_positions.weight",
    embedding="decoder.embed_tokens.weight",
)

OPENAI = Layout(
    block="blocks.{}.",
    block_parts={
        "attention.norm": ["attn_ln"],
        "attention.query_key_value": ["attn.query", "attn.key", "attn.value"],
        "attention.output": ["attn.out"],
        "feed_forward.norm": ["mlp_ln"],
        "feed_forward.w1": ["mlp.0"],
        "feed_forward.w2": ["mlp.2"],
    },
    cross_parts={
        "cross_attention.norm": ["cross_attn_ln"],
        "cross_attention.query": ["cross_attn.query"],
        "cross_attention.key_value": ["cross_attn.key", "cross_attn.value"],
        "cross_attention.output": ["cross_attn.out"],
    },
    encoder={"stem.first": "encoder.conv1", "stem.second": "encoder.conv2", "norm": "encoder.ln_post"},
    decoder={"norm": "decoder.ln"},
    encoder_positions="encoder.positional_embedding",
    decoder_positions="decoder.positional_embedding",
    embedding="decoder.token_embedding.weight",
)

# With "." for "/", and "weight" and "bias" for a norm's "gamma" and "beta".
CTRANSLATE2 = Layout(
    block="layer_{}.",
    block_parts={
        "attention.norm": ["self_attention.layer_norm"],
        "attention.query_key_value": ["self_attention.linear_0"],
        "attention.output": ["self_attention.linear_1"],
        "feed_forward.norm": ["ffn.layer_norm"],
        "feed_forward.w1": ["ffn.linear_0"],
        "feed_forward.w2": ["ffn.linear_1"],
    },
    cross_parts={
        "cross_attention.norm": ["attention.layer_norm"],
        "cross_attention.query": ["attention.linear_0"],
        "cross_attention.key_value": ["attention.linear_1"],
        "cross_attention.output": ["attention.linear_2"],
    },
    encoder={"stem.first": "encoder.conv1", "stem.second": "encoder.conv2", "norm": "encoder.layer_norm"},
    decoder={"norm": "decoder.layer_norm"},
    encoder_positions="encoder.position_encodings.encodings",
    decoder_positions="decoder.position_encodings.encodings",
    embedding="decoder.embeddings.weight",
)


def convert(tensors: Tensors, layout: Layout, encoder_layers: int, decoder_layers: int) -> tuple[Tensors, Tensors]:
    """Our state of the encoder and of the decoder, in float32.

    Raises:
        KeyError: a tensor is missing.
    """
    encoder, decoder = Tensors(), Tensors()
    for name, theirs in layout.encoder.items():
        weight = tensors[f"{theirs}.weight"]
        if weight.dim() == 3:  # a convolution [out, in, taps], as a linear layer on [taps x in]
            weight = weight.transpose(1, 2).flatten(1)
        encoder[f"{name}.weight"], encoder[f"{name}.bias"] = weight, tensors[f"{theirs}.bias"]
    encoder["stem.positions_TD"] = tensors[layout.encoder_positions]
    for name, theirs in layout.decoder.items():
        decoder[f"{name}.weight"], decoder[f"{name}.bias"] = tensors[f"{theirs}.weight"], tensors[f"{theirs}.bias"]
    decoder["embedding.weight"] = tensors[layout.embedding]
    decoder["positions_UD"] = tensors[layout.decoder_positions]
    for state, kind, count, parts in (
        (encoder, "encoder", encoder_layers, layout.block_parts),
        (decoder, "decoder", decoder_layers, layout.block_parts | layout.cross_parts),
    ):
        for block in range(count):
            start = f"{kind}.{layout.block.format(block)}"
            for name, pieces in parts.items():
                part = f"blocks.{block}.{name}"
                state[f"{part}.weight"], state[f"{part}.bias"] = _stack(tensors, [start + piece for piece in pieces])
    return _float32(encoder), _float32(decoder)


def _float32(state: Tensors) -> Tensors:
    return {name: value.float().contiguous() for name, value in state.items()}


def _stack(tensors: Tensors, names: list[str]) -> tuple[Tensor, Tensor]:
    """Weights and biases one below the other; a part without bias (the keys) has zeros."""
    weights = [tensors[f"{name}.weight"] for name in names]
    biases = [
        tensors.get(f"{name}.bias", weight.new_zeros(len(weight))) for name, weight in zip(names, weights, strict=True)
    ]
    return torch.cat(weights), torch.cat(biases)
