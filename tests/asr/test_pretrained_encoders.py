"""wav2vec 2.0 and w2v-BERT 2.0 against torchaudio and transformers, on tiny models with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
)

from mole_asr.asr.pretrained_encoders import feed_forward_weights, from_torchaudio, load_pretrained_encoder
from mole_asr.asr.w2v_bert import FilterBanks
from mole_asr.errors import MoleError
from mole_asr.moe.experts import feed_forward

from .conftest import pad_waves

CONVOLUTIONS = [(8, 10, 5), (12, 3, 2), (12, 3, 2), (8, 2, 2)]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    samples = np.arange(round(seconds * 16000))
    level = 0.1 + 0.09 * np.sin(samples / 3000)
    return (0.01 + level * np.random.default_rng(seed).standard_normal(len(samples))).astype(np.float32)


def randomize(model: Any) -> Any:
    """Moves every weight, so that none is one or zero, and turns off what training does at random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def torchaudio_model(norm_first: bool) -> Any:
    model = torchaudio.models.wav2vec2_model(
        extractor_mode="layer_norm" if norm_first else "group_norm",
        extractor_conv_layer_config=CONVOLUTIONS,
        extractor_conv_bias=norm_first,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=4,
        encoder_num_layers=2,
        encoder_num_heads=2,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=24,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=norm_first,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    return randomize(model)


def hugging_face_config(norm_first: bool) -> dict[str, Any]:
    channels, kernels, strides = zip(*CONVOLUTIONS, strict=True)
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "conv_bias": norm_first,
        "num_feat_extract_layers": len(CONVOLUTIONS),
        "feat_extract_norm": "layer" if norm_first else "group",
        "do_stable_layer_norm": norm_first,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "vocab_size": 20,
    }


def w2v_bert_model(**changes: Any) -> Any:
    config = Wav2Vec2BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_depthwise_kernel_size=7,
        left_max_position_embeddings=12,
        right_max_position_embeddings=5,
        **changes,
    )
    return randomize(Wav2Vec2BertModel(config))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


ENCODERS: dict[str, Callable[[Path], nn.Module]] = {
    "torchaudio, norm first": lambda _: from_torchaudio(torchaudio_model(True)),
    "torchaudio, norm last": lambda _: from_torchaudio(torchaudio_model(False)),
    "transformers, norm first": lambda folder: load_pretrained_encoder(
        saved(randomize(Wav2Vec2Model(Wav2Vec2Config(**hugging_face_config(True)))), folder)
    ),
    "w2v-BERT": lambda folder: load_pretrained_encoder(saved(w2v_bert_model(), folder)),
}


@pytest.fixture(params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return ENCODERS[request.param](tmp_path)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("normalizes", [True, False])
def test_torchaudio_models(norm_first: bool, normalizes: bool) -> None:
    model = torchaudio_model(norm_first)
    if normalizes:
        model = torchaudio.pipelines._wav2vec2.utils._extend_model(model, normalize_waveform=True)
    audio_BS, lengths_B = pad_waves(noise(1.234))
    with torch.inference_mode():
        expected_BTD, _ = model(audio_BS)
        found_BTD, frames_B = from_torchaudio(model)(audio_BS, lengths_B)
    assert frames_B.tolist() == [expected_BTD.shape[1]]
    torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-4, rtol=0)


def test_a_padded_batch_of_torchaudio() -> None:
    """Where the published model does not look at padding (layer norms), batches must be equal too."""
    model = torchaudio_model(True)
    audio_BS, lengths_B = pad_waves(noise(0.9), noise(1.5, 1))
    with torch.inference_mode():
        expected_BTD, expected_B = model(audio_BS, lengths_B)
        found_BTD, frames_B = from_torchaudio(model)(audio_BS, lengths_B)
    assert frames_B.tolist() == expected_B.tolist()
    for row, size in enumerate(frames_B):
        torch.testing.assert_close(found_BTD[row, :size], expected_BTD[row, :size], atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["bare", "ctc", "hubert"])
def test_hugging_face_folders(norm_first: bool, kind: str, tmp_path: Path) -> None:
    values = hugging_face_config(norm_first)
    model = randomize(
        HubertModel(HubertConfig(**values))
        if kind == "hubert"
        else (Wav2Vec2ForCTC if kind == "ctc" else Wav2Vec2Model)(Wav2Vec2Config(**values))
    )
    extractor = Wav2Vec2FeatureExtractor(do_normalize=norm_first)
    extractor.save_pretrained(tmp_path)
    wave = noise(1.234)
    with torch.inference_mode():
        inputs = extractor(wave, sampling_rate=16000, return_tensors="pt").input_values
        base = model.wav2vec2 if kind == "ctc" else model
        expected_BTD = base(inputs).last_hidden_state
        found_BTD, _ = load_pretrained_encoder(saved(model, tmp_path))(*pad_waves(wave))
    torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-4, rtol=0)


def test_torchaudios_import_of_hugging_face_models() -> None:
    model = randomize(Wav2Vec2ForCTC(Wav2Vec2Config(**hugging_face_config(True))))
    imported = torchaudio.models.wav2vec2.utils.import_huggingface_model(model)
    audio_BS, lengths_B = pad_waves(noise(1.0))
    with torch.inference_mode():
        expected_BTD = model.wav2vec2(audio_BS).last_hidden_state
        found_BTD, _ = from_torchaudio(imported)(audio_BS, lengths_B)
    torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-4, rtol=0)


def test_old_names_of_the_positions_kernel(tmp_path: Path) -> None:
    model = randomize(Wav2Vec2Model(Wav2Vec2Config(**hugging_face_config(True))))
    expected_BTD, _ = load_pretrained_encoder(saved(model, tmp_path))(*pad_waves(noise(0.5)))
    start = "encoder.pos_conv_embed.conv."
    state = model.state_dict()
    for new, old in (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    ):
        state[start + old] = state.pop(start + new)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    found_BTD, _ = load_pretrained_encoder(tmp_path)(*pad_waves(noise(0.5)))
    torch.testing.assert_close(found_BTD, expected_BTD)


@pytest.mark.parametrize("seconds", [1.234, 1.24, 0.05])
def test_filter_banks_of_w2v_bert(seconds: float) -> None:
    wave = noise(seconds)
    expected = SeamlessM4TFeatureExtractor()(wave, sampling_rate=16000, return_tensors="pt")
    size = int(expected.attention_mask.sum())
    features, frames_B = FilterBanks(80)(*pad_waves(wave))
    assert frames_B.tolist() == [size]
    torch.testing.assert_close(features[0, :size], expected.input_features[0, :size], atol=1e-3, rtol=0)


def test_w2v_bert_of_transformers(tmp_path: Path) -> None:
    model = w2v_bert_model()
    waves = [noise(0.9), noise(1.5, 1), noise(1.21, 2)]
    inputs = SeamlessM4TFeatureExtractor()(waves, sampling_rate=16000, return_tensors="pt")
    encoder = load_pretrained_encoder(saved(model, tmp_path))
    with torch.inference_mode():
        expected_BTD = model(**inputs).last_hidden_state
        found_BTD, frames_B = encoder(*pad_waves(*waves))
    assert frames_B.tolist() == inputs.attention_mask.sum(1).tolist()
    for row, size in enumerate(frames_B):
        torch.testing.assert_close(found_BTD[row, :size], expected_BTD[row, :size], atol=1e-4, rtol=0)


def test_padding_does_not_change_an_utterance(encoder: Any) -> None:
    waves = [noise(0.77), noise(1.9, 1), noise(1.415, 2)]
    with torch.inference_mode():
        together_BTD, frames_B = encoder(*pad_waves(*waves))
        for row, wave in enumerate(waves):
            alone_BTD, alone_B = encoder(*pad_waves(wave))
            assert frames_B[row] == alone_B
            size = int(alone_B)
            # Sums over a longer padded waveform round otherwise, and norms over 8 channels enlarge that.
            torch.testing.assert_close(together_BTD[row, :size], alone_BTD[0, :size], atol=1e-4, rtol=0)


def test_the_shortest_utterances_have_a_frame(encoder: Any) -> None:
    with torch.inference_mode():
        x_BTD, frames_B = encoder(*pad_waves(noise(0.001), noise(0.2)))
    assert frames_B[0] == 1
    assert x_BTD.isfinite().all()


def test_parts_one_by_one_and_every_weight_learns(encoder: Any) -> None:
    audio_BS, lengths_B = pad_waves(noise(0.5), noise(0.7, 1))
    expected_BTD, _ = encoder(audio_BS, lengths_B)
    x_BTD, frames_B = encoder.stem(audio_BS, lengths_B)
    frames = encoder.frames(frames_B, x_BTD.shape[1])
    for block in encoder.blocks:
        x_BTD = block(x_BTD, frames, None)
    x_BTD = encoder.norm(x_BTD)
    torch.testing.assert_close(x_BTD, expected_BTD)
    (x_BTD * torch.randn_like(x_BTD)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_experts_that_are_copies_compute_the_same(encoder: Any) -> None:
    """What stands in for a feed-forward part needs its norm, its weights and its activation, and nothing else."""

    class Copy(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.norm, self.weights = feed_forward_weights(block)

        def forward(self, x_BTD: Tensor, frames: Any, decision: Any) -> Tensor:
            return feed_forward(self.norm(x_BTD), self.weights, encoder.activation)

    inputs = pad_waves(noise(0.5), noise(0.7, 1))
    with torch.inference_mode():
        expected_BTD, _ = encoder(*inputs)
        for block in encoder.blocks:
            block.feed_forward = Copy(block)
        found_BTD, _ = encoder(*inputs)
    torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is none of"),
        ({"hidden_act": "relu"}, "hidden_act is not supported"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim is not supported"),
        ({"hidden_size": 18}, "sizes make no model"),
        ({"intermediate_size": 18}, "do not fit"),
        ({"num_hidden_layers": 3}, r"tensor encoder\.layers\.2\.\S+ is missing"),
        ({"conv_dim": None}, "conv_dim"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = saved(Wav2Vec2Model(Wav2Vec2Config(**hugging_face_config(True))), tmp_path)
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(MoleError, match=message) as caught:
        load_pretrained_encoder(folder)
    assert "\n" not in str(caught.value)


def test_w2v_bert_variants_are_refused(tmp_path: Path) -> None:
    folder = saved(w2v_bert_model(position_embeddings_type="rotary"), tmp_path)
    with pytest.raises(MoleError, match="position_embeddings_type is not supported"):
        load_pretrained_encoder(folder)


def test_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MoleError, match=r"torchaudio:NOTHING: torchaudio\.pipelines has no such model"):
        load_pretrained_encoder("torchaudio:NOTHING")
    model = torchaudio_model(True)
    bundle = torchaudio.pipelines.WAV2VEC2_XLSR_300M
    monkeypatch.setattr(type(bundle), "get_model", lambda self: model)
    audio_BS, lengths_B = pad_waves(noise(0.5))
    with torch.inference_mode():
        found_BTD, _ = load_pretrained_encoder("torchaudio:WAV2VEC2_XLSR_300M")(audio_BS, lengths_B)
        torch.testing.assert_close(found_BTD, model(audio_BS)[0], atol=1e-4, rtol=0)

    def offline(self: Any) -> nn.Module:
        raise OSError("no network\nat all")

    monkeypatch.setattr(type(bundle), "get_model", offline)
    with pytest.raises(MoleError, match=r"cannot be fetched \(no network\)"):
        load_pretrained_encoder("torchaudio:WAV2VEC2_XLSR_300M")


def test_wavlm_is_refused() -> None:
    model = torchaudio.models.wavlm_model(
        "layer_norm", CONVOLUTIONS, False, 16, 0.0, 8, 4, 2, 2, 32, 50, 0.0, 24, 0.0, 0.0, True, 0.0, None
    )
    with pytest.raises(MoleError, match=r"no wav2vec 2\.0 model"):
        from_torchaudio(model)
