"""Loads pretrained encoders that have no text decoder: wav2vec 2.0, XLS-R, MMS, HuBERT, and w2v-BERT 2.0.

All give, as `WhisperEncoder` does, `stem` (here from waveforms), `blocks` with a `feed_forward` part that a mixture of
experts can stand in for, `norm`, and `frames` for what the blocks want to know of a batch.

Letters: D model width, K kernel.
"""

from pathlib import Path
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn

from mole_asr.asr.model_files import CONFIG, Tensors, find_model, first_line, read_json, read_weights
from mole_asr.asr.w2v_bert import W2vBertConfig, W2vBertEncoder
from mole_asr.asr.wav2vec2 import Wav2Vec2Config, Wav2Vec2Encoder
from mole_asr.asr.whisper import WhisperFeedForward
from mole_asr.errors import MoleError
from mole_asr.moe.experts import ExpertWeights

TORCHAUDIO = "torchaudio:"
_PREPROCESSOR = "preprocessor_config.json"


def load_pretrained_encoder(path_or_name: str | Path) -> Wav2Vec2Encoder | W2vBertEncoder:
    """Loads an encoder, in evaluation mode, float32.

    Args:
        path_or_name: a folder in Hugging Face's format (config.json, weights) of a wav2vec 2.0, HuBERT or w2v-BERT 2.0
            model (with any head, which is left out); "owner/name" of one on the Hugging Face hub; or "torchaudio:" and
            the name of a bundle of torchaudio.pipelines, such as torchaudio:WAV2VEC2_XLSR_300M.

    Raises:
        MoleError: nothing is there, or it is no whole model that we know how to run.
    """
    name = str(path_or_name)
    if name.startswith(TORCHAUDIO):
        return from_torchaudio(_bundle_model(name))
    folder = find_model(path_or_name, (CONFIG, _PREPROCESSOR))
    path = folder / CONFIG
    values = read_json(path)
    kind = values.get("model_type")
    try:
        if kind in ("wav2vec2", "hubert"):
            encoder: Wav2Vec2Encoder | W2vBertEncoder = Wav2Vec2Encoder(_wav2vec2_config(values, folder))
        elif kind == "wav2vec2-bert":
            encoder = W2vBertEncoder(_w2v_bert_config(values, path))
        else:
            raise MoleError(
                f"{path}: model_type {kind!r} is none of wav2vec2, hubert, wav2vec2-bert; give such a model"
            )
    except KeyError as error:
        raise MoleError(f"{path}: key {error.args[0]} is missing; copy the model anew") from None
    except (TypeError, ValueError) as error:  # as torch's modules raise for sizes that cannot be
        raise MoleError(f"{path}: its sizes make no model ({first_line(error)}); copy the model anew") from None
    tensors = {
        key.removeprefix("wav2vec2.").removeprefix("hubert.").removeprefix("wav2vec2_bert."): value.float()
        for key, value in read_weights(folder).items()
    }
    return _filled(encoder, tensors, folder)


def from_torchaudio(model: nn.Module) -> Wav2Vec2Encoder:
    """Our encoder with the weights of a `torchaudio.models.Wav2Vec2Model` (wav2vec 2.0 or HuBERT, not WavLM).

    Args:
        model: as the `torchaudio.models.wav2vec2_*` functions, a bundle's `get_model`, or
            `torchaudio.models.wav2vec2.utils.import_huggingface_model` give it.

    Raises:
        MoleError: it is something else.
    """
    # Bundles wrap models that want normalised waveforms.
    normalizes = bool(getattr(model, "normalize_waveform", False))
    inner: Any = getattr(model, "model", model)
    try:
        transformer = inner.encoder.transformer
        layers, first = inner.feature_extractor.conv_layers, transformer.layers[0]
        config = Wav2Vec2Config(
            conv_channels=tuple(layer.conv.out_channels for layer in layers),
            conv_kernels=tuple(layer.kernel_size for layer in layers),
            conv_strides=tuple(layer.stride for layer in layers),
            conv_bias=layers[0].conv.bias is not None,
            group_norm=isinstance(layers[0].layer_norm, nn.GroupNorm),
            d_model=first.attention.embed_dim,
            d_ff=first.feed_forward.intermediate_dense.out_features,
            encoder_layers=len(transformer.layers),
            encoder_heads=first.attention.num_heads,
            position_kernel=transformer.pos_conv_embed.kernel_size,
            position_groups=transformer.pos_conv_embed.conv.groups,
            norm_first=first.layer_norm_first,
            waveform_eps=1e-5 if normalizes else None,
        )
        first.attention.k_proj  # noqa: B018  # WavLM has none
    except AttributeError as error:
        raise MoleError(f"{type(inner).__name__}: no wav2vec 2.0 model of torchaudio ({error})") from None
    tensors = {
        key.replace("encoder.transformer.", "encoder.").replace("encoder.feature_projection.", "feature_projection."): t
        for key, t in inner.state_dict().items()
    }
    encoder = _filled(Wav2Vec2Encoder(config), tensors, Path(type(inner).__name__))
    assert isinstance(encoder, Wav2Vec2Encoder)
    return encoder


def feed_forward_weights(block: nn.Module) -> tuple[nn.LayerNorm, ExpertWeights]:
    """The norm and the weights of a block's feed-forward part, to start experts from; for all pretrained encoders."""
    part = block.feed_forward
    assert isinstance(part, WhisperFeedForward), "the block has experts already"
    return part.norm, ExpertWeights(part.w1.weight, part.w1.bias, part.w2.weight, part.w2.bias)


def _bundle_model(name: str) -> nn.Module:
    bundle: Any = getattr(torchaudio.pipelines, name.removeprefix(TORCHAUDIO), None)
    if not hasattr(bundle, "get_model"):
        raise MoleError(f"{name}: torchaudio.pipelines has no such model; torchaudio:WAV2VEC2_XLSR_300M is one")
    try:
        return bundle.get_model()
    except (OSError, RuntimeError) as error:  # no network, a full disk, a broken file
        raise MoleError(f"{name}: cannot be fetched ({first_line(error)})") from None


def _wav2vec2_config(values: dict[str, Any], folder: Path) -> Wav2Vec2Config:
    path = folder / CONFIG
    _refuse(
        path,
        {
            "hidden_act": values.get("hidden_act", "gelu") != "gelu",
            "feat_extract_activation": values.get("feat_extract_activation", "gelu") != "gelu",
            "adapter_attn_dim": values.get("adapter_attn_dim") is not None,  # a small part a language, in mms-1b-all
            "add_adapter": values.get("add_adapter", False),
            "conv_pos_batch_norm": values.get("conv_pos_batch_norm", False),
            "feat_proj_layer_norm": not values.get("feat_proj_layer_norm", True),
        },
    )
    preprocessor = folder / _PREPROCESSOR
    normalizes = read_json(preprocessor).get("do_normalize", True) if preprocessor.exists() else True
    return Wav2Vec2Config(
        conv_channels=tuple(values["conv_dim"]),
        conv_kernels=tuple(values["conv_kernel"]),
        conv_strides=tuple(values["conv_stride"]),
        conv_bias=values["conv_bias"],
        group_norm=values["feat_extract_norm"] == "group",
        d_model=values["hidden_size"],
        d_ff=values["intermediate_size"],
        encoder_layers=values["num_hidden_layers"],
        encoder_heads=values["num_attention_heads"],
        position_kernel=values["num_conv_pos_embeddings"],
        position_groups=values["num_conv_pos_embedding_groups"],
        norm_first=values["do_stable_layer_norm"],
        waveform_eps=1e-7 if normalizes else None,
    )


def _w2v_bert_config(values: dict[str, Any], path: Path) -> W2vBertConfig:
    _refuse(
        path,
        {
            "hidden_act": values.get("hidden_act", "swish") not in ("swish", "silu"),
            "position_embeddings_type": values.get("position_embeddings_type") != "relative_key",
            "add_adapter": values.get("add_adapter", False),
            "use_intermediate_ffn_before_adapter": values.get("use_intermediate_ffn_before_adapter", False),
        },
    )
    return W2vBertConfig(
        num_mels=values["feature_projection_input_dim"] // 2,
        d_model=values["hidden_size"],
        d_ff=values["intermediate_size"],
        encoder_layers=values["num_hidden_layers"],
        encoder_heads=values["num_attention_heads"],
        kernel_size=values["conv_depthwise_kernel_size"],
        left_positions=values["left_max_position_embeddings"],
        right_positions=values["right_max_position_embeddings"],
    )


def _refuse(path: Path, unsupported: dict[str, bool]) -> None:
    for key, is_unsupported in unsupported.items():
        if is_unsupported:
            raise MoleError(f"{path}: this value of {key} is not supported; give the plain pretrained model")


def _filled(
    encoder: Wav2Vec2Encoder | W2vBertEncoder, tensors: Tensors, path: Path
) -> Wav2Vec2Encoder | W2vBertEncoder:
    """Gives an encoder its weights, named as Hugging Face names them."""
    try:
        state = (
            _wav2vec2_state(tensors, encoder)
            if isinstance(encoder, Wav2Vec2Encoder)
            else _w2v_bert_state(tensors, encoder)
        )
        encoder.load_state_dict(state)
    except KeyError as error:
        raise MoleError(f"{path}: tensor {error.args[0]} is missing; copy the model anew") from None
    except RuntimeError as error:
        raise MoleError(f"{path}: the weights do not fit config.json: {' '.join(str(error).split())}") from None
    return encoder.eval()


def _copy(state: Tensors, ours: str, tensors: Tensors, *theirs: str) -> None:
    """Weights and biases (where there are any) of their parts, one below the other."""
    state[f"{ours}.weight"] = torch.cat([tensors[f"{name}.weight"] for name in theirs])
    if f"{theirs[0]}.bias" in tensors:
        state[f"{ours}.bias"] = torch.cat([tensors[f"{name}.bias"] for name in theirs])


def _as_linear(weight: Tensor) -> Tensor:
    """A convolution [out, in, K] as a linear layer on K x in values."""
    return weight.transpose(1, 2).flatten(1)


def _copy_feed_forward(state: Tensors, ours: str, tensors: Tensors, norm: str, theirs: str) -> None:
    _copy(state, f"{ours}.norm", tensors, norm)
    _copy(state, f"{ours}.w1", tensors, f"{theirs}.intermediate_dense")
    _copy(state, f"{ours}.w2", tensors, f"{theirs}.output_dense")


def _wav2vec2_state(tensors: Tensors, encoder: Wav2Vec2Encoder) -> Tensors:
    config, state = encoder.config, Tensors()
    for number, layer in enumerate(encoder.stem.layers):
        ours, theirs = f"stem.layers.{number}", f"feature_extractor.conv_layers.{number}"
        _copy(state, f"{ours}.linear", tensors, f"{theirs}.conv")
        state[f"{ours}.linear.weight"] = _as_linear(state[f"{ours}.linear.weight"])
        if layer.norm is not None:
            _copy(state, f"{ours}.norm", tensors, f"{theirs}.layer_norm")
    _copy(state, "stem.projection_norm", tensors, "feature_projection.layer_norm")
    _copy(state, "stem.projection", tensors, "feature_projection.projection")
    state["stem.position.weight"] = _position_weight(tensors)
    state["stem.position.bias"] = tensors["encoder.pos_conv_embed.conv.bias"]
    _copy(state, "norm" if config.norm_first else "stem.norm", tensors, "encoder.layer_norm")
    for number in range(config.encoder_layers):
        ours, theirs = f"blocks.{number}", f"encoder.layers.{number}"
        first, last = f"{theirs}.layer_norm", f"{theirs}.final_layer_norm"
        names = [f"{theirs}.attention.{name}_proj" for name in ("q", "k", "v")]
        _copy(state, f"{ours}.attention.query_key_value", tensors, *names)
        _copy(state, f"{ours}.attention.output", tensors, f"{theirs}.attention.out_proj")
        _copy(state, f"{ours}.attention.norm" if config.norm_first else f"{ours}.attention_norm", tensors, first)
        if not config.norm_first:
            _copy(state, f"{ours}.norm", tensors, last)
        _copy_feed_forward(
            state, f"{ours}.feed_forward", tensors, last if config.norm_first else first, f"{theirs}.feed_forward"
        )
    return state


def _position_weight(tensors: Tensors) -> Tensor:
    """The kernel of the convolution for positions, which is stored as length and direction a tap."""
    start = "encoder.pos_conv_embed.conv."
    # The names before and since torch 2.
    new, old = ("parametrizations.weight.original0", "parametrizations.weight.original1"), ("weight_g", "weight_v")
    length, direction = (tensors[start + name] for name in (new if start + new[0] in tensors else old))
    return length * direction / direction.norm(dim=(0, 1), keepdim=True)


def _w2v_bert_state(tensors: Tensors, encoder: W2vBertEncoder) -> Tensors:
    state = Tensors()
    _copy(state, "stem.norm", tensors, "feature_projection.layer_norm")
    _copy(state, "stem.projection", tensors, "feature_projection.projection")
    for number in range(encoder.config.encoder_layers):
        ours, theirs = f"blocks.{number}", f"encoder.layers.{number}"
        attention, convolution = f"{theirs}.self_attn", f"{theirs}.conv_module"
        names = [f"{attention}.linear_{name}" for name in ("q", "k", "v")]
        _copy_feed_forward(state, f"{ours}.feed_forward_in", tensors, f"{theirs}.ffn1_layer_norm", f"{theirs}.ffn1")
        _copy_feed_forward(state, f"{ours}.feed_forward", tensors, f"{theirs}.ffn2_layer_norm", f"{theirs}.ffn2")
        _copy(state, f"{ours}.attention.norm", tensors, f"{theirs}.self_attn_layer_norm")
        _copy(state, f"{ours}.attention.query_key_value", tensors, *names)
        _copy(state, f"{ours}.attention.output", tensors, f"{attention}.linear_out")
        state[f"{ours}.attention.distance_RW"] = tensors[f"{attention}.distance_embedding.weight"]
        _copy(state, f"{ours}.convolution.norm", tensors, f"{convolution}.layer_norm")
        _copy(state, f"{ours}.convolution.depthwise_norm", tensors, f"{convolution}.depthwise_layer_norm")
        for name, conv in (("gated", "pointwise_conv1"), ("pointwise", "pointwise_conv2")):
            state[f"{ours}.convolution.{name}.weight"] = _as_linear(tensors[f"{convolution}.{conv}.weight"])
        state[f"{ours}.convolution.depthwise_KD"] = tensors[f"{convolution}.depthwise_conv.weight"][:, 0].T
        _copy(state, f"{ours}.norm", tensors, f"{theirs}.final_layer_norm")
    return state
