"""Whisper's features, encoder and decoder against transformers', on a tiny model with random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from mole_asr.asr.whisper import (
    SEGMENT_SAMPLES,
    WhisperEncoder,
    WhisperFeatures,
    whisper_frames,
)
from mole_asr.asr.whisper_checkpoint import load_whisper
from mole_asr.asr.whisper_decoder import CACHE_BLOCK, WhisperDecoder
from mole_asr.errors import MoleError

from .conftest import pad_waves

Parts = tuple[WhisperEncoder, WhisperDecoder]


@pytest.fixture(scope="module")
def parts(whisper_folder: Path) -> Parts:
    checkpoint = load_whisper(whisper_folder)
    encoder, decoder = WhisperEncoder(checkpoint.config), WhisperDecoder(checkpoint.config)
    encoder.load_state_dict(checkpoint.encoder)
    decoder.load_state_dict(checkpoint.decoder)
    return encoder.eval(), decoder.eval()


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose level goes up and down, so that the clamp of quiet frames matters."""
    samples = np.arange(round(seconds * 16000))
    level = np.exp(6 * np.sin(samples / 9000) - 8)
    return (level * np.random.default_rng(seed).standard_normal(len(samples))).astype(np.float32)


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("seconds", [30.0, 3.21, 0.5 + 1 / 16000, 29.99])
def test_features_are_whispers(num_mels: int, seconds: float) -> None:
    wave = noise(seconds)
    expected = WhisperFeatureExtractor(num_mels)(wave, sampling_rate=16000, return_tensors="pt").input_features
    features_BTF, frames_B = WhisperFeatures(num_mels)(*pad_waves(wave))
    assert frames_B.tolist() == [-(-len(wave) // 160)]
    assert features_BTF.shape[1] == min(int(frames_B) + 2, 3000)
    # The frames beyond the end too: what the convolutions see there.
    torch.testing.assert_close(features_BTF, expected.transpose(1, 2)[:, : features_BTF.shape[1]], atol=1e-4, rtol=0)


def test_features_do_not_depend_on_padding() -> None:
    waves = [noise(1.0), noise(2.345, 1), noise(0.1, 2)]
    features = WhisperFeatures()
    together_BTF, frames_B = features(*pad_waves(*waves))
    for row, wave in enumerate(waves):
        alone_BTF, _ = features(*pad_waves(wave))
        size = int(frames_B[row]) + 2
        torch.testing.assert_close(together_BTF[row, :size], alone_BTF[0, :size], atol=1e-6, rtol=0)


def test_digital_silence_has_finite_features() -> None:
    features_BTF, _ = WhisperFeatures()(torch.zeros(1, 8000), torch.tensor([8000]))
    assert features_BTF.unique().tolist() == [-1.5]


def test_encoder_and_decoder_equal_transformers(parts: Parts, whisper_model: WhisperForConditionalGeneration) -> None:
    encoder, decoder = parts
    features_BTF, frames_B = WhisperFeatures()(*pad_waves(noise(30.0), noise(30.0, 1)))
    tokens_BU = torch.randint(0, 300, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whisper_model(input_features=features_BTF.transpose(1, 2), decoder_input_ids=tokens_BU)
        memory_BTD, lengths_B = encoder(features_BTF, frames_B)
        logits_BUV = decoder(tokens_BU, memory_BTD, lengths_B)
    assert lengths_B.tolist() == [1500, 1500]
    torch.testing.assert_close(memory_BTD, expected.encoder_last_hidden_state, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_BUV, expected.logits, atol=1e-4, rtol=0)


def test_greedy_text_equals_transformers(parts: Parts, whisper_model: WhisperForConditionalGeneration) -> None:
    encoder, decoder = parts
    features_BTF, frames_B = WhisperFeatures()(*pad_waves(noise(30.0, 2)))
    ours, theirs = [3, 7, 11], [3, 7, 11]
    with torch.inference_mode():
        memory_BTD, lengths_B = encoder(features_BTF, frames_B)
        cache = decoder.cross_cache(memory_BTD, lengths_B)
        logits_BV = decoder.read(torch.tensor([ours]), cache)
        for _ in range(20):
            expected = whisper_model(encoder_outputs=(memory_BTD,), decoder_input_ids=torch.tensor([theirs])).logits
            # Random weights say one word over and over: each may come once.
            ours.append(int(logits_BV[0].index_fill(0, torch.tensor(ours), -1e9).argmax()))
            theirs.append(int(expected[0, -1].index_fill(0, torch.tensor(theirs), -1e9).argmax()))
            logits_BV = decoder.read(torch.tensor([ours[-1:]]), cache)
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_does_not_change_an_utterance(parts: Parts, dtype: torch.dtype) -> None:
    encoder, decoder = parts
    waves = [noise(0.77), noise(1.9, 1), noise(1.415, 2)]
    tokens_BU = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    features = WhisperFeatures()
    # bfloat16 rounds by 4e-3; values are about 1.
    atol = 1e-5 if dtype == torch.float32 else 0.05
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        memory_BTD, lengths_B = encoder(*features(*pad_waves(*waves)))
        logits_BUV = decoder(tokens_BU, memory_BTD, lengths_B)
        for row, wave in enumerate(waves):
            alone_BTD, _ = encoder(*features(*pad_waves(wave)))
            assert alone_BTD.shape[1] == lengths_B[row]
            torch.testing.assert_close(memory_BTD[row, : lengths_B[row]], alone_BTD[0], atol=atol, rtol=0)
            alone_BUV = decoder(tokens_BU[row : row + 1], alone_BTD, lengths_B[row : row + 1])
            torch.testing.assert_close(logits_BUV[row], alone_BUV[0], atol=atol, rtol=0)


def test_true_length_hears_what_whisper_hears_before_attention(
    parts: Parts, whisper_model: WhisperForConditionalGeneration
) -> None:
    wave = noise(2.345)
    with torch.inference_mode():
        x_BTD, lengths_B = parts[0].stem(*WhisperFeatures()(*pad_waves(wave)))
        mel = WhisperFeatureExtractor()(wave, sampling_rate=16000, return_tensors="pt").input_features
        encoder = whisper_model.model.encoder
        expected = torch.nn.functional.gelu(encoder.conv2(torch.nn.functional.gelu(encoder.conv1(mel))))
        expected = (expected.transpose(1, 2) + encoder.embed_positions.weight)[:, : int(lengths_B)]
    torch.testing.assert_close(x_BTD, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [5, CACHE_BLOCK + 5])
def test_decoding_with_a_cache_equals_recomputation(parts: Parts, steps: int) -> None:
    encoder, decoder = parts
    tokens_BU = torch.randint(0, 300, (3, 4 + steps), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        memory_BTD, lengths_B = encoder(*WhisperFeatures()(*pad_waves(noise(0.5), noise(1.1, 1), noise(0.8, 2))))
        expected_BUV = decoder(tokens_BU, memory_BTD, lengths_B)
        cache = decoder.cross_cache(memory_BTD, lengths_B)
        rows = torch.arange(3)
        found_BV = decoder.read(tokens_BU[:, :4], cache)
        torch.testing.assert_close(found_BV, expected_BUV[:, 3], atol=1e-5, rtol=0)
        for place in range(4, 4 + steps):
            if place == 6:  # the second utterance has ended, and the others change places
                rows = torch.tensor([2, 0])
                cache.select(rows, rows)
            found_BV = decoder.read(tokens_BU[rows, place, None], cache)
            torch.testing.assert_close(found_BV, expected_BUV[rows, place], atol=1e-5, rtol=0)
    assert cache.length == 4 + steps


def test_every_weight_learns(parts: Parts) -> None:
    encoder, decoder = parts
    memory_BTD, lengths_B = encoder(*WhisperFeatures()(*pad_waves(noise(0.5), noise(0.7, 1))))
    logits_BUV = decoder(torch.tensor([[3, 7, 5], [3, 9, 4]]), memory_BTD, lengths_B)
    logits_BUV.log_softmax(-1)[..., 5].sum().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    encoder.zero_grad()
    decoder.zero_grad()


def test_a_block_calls_what_stands_for_its_feed_forward(whisper_folder: Path, parts: Parts) -> None:
    class Recorder(torch.nn.Module):
        def forward(self, x_BTD: Tensor, frames: Any, decision: Any) -> Tensor:
            self.seen = (frames, decision)
            return torch.zeros_like(x_BTD)

    encoder = WhisperEncoder(load_whisper(whisper_folder).config)
    block, recorder = encoder.blocks[0], Recorder()
    block.feed_forward = recorder
    x_BTD = torch.randn(2, 7, encoder.config.d_model)
    frames = whisper_frames(torch.tensor([7, 4]), 7, encoder.config.encoder_heads)
    y_BTD = block(x_BTD, frames, "a decision")
    assert recorder.seen == (frames, "a decision")
    torch.testing.assert_close(y_BTD, x_BTD + block.attention(x_BTD, frames.bias_GTT))


def test_utterances_and_texts_beyond_the_positions_are_refused(parts: Parts) -> None:
    encoder, decoder = parts
    features = WhisperFeatures()(torch.zeros(1, SEGMENT_SAMPLES + 320), torch.tensor([SEGMENT_SAMPLES + 320]))
    with pytest.raises(MoleError, match=r"30\.0 s, but Whisper's positions end at 30 s"):
        encoder(*features)
    memory_BTD = torch.zeros(1, 4, decoder.config.d_model)
    with pytest.raises(MoleError, match=r"449 tokens.* ends at 448"):
        decoder(torch.zeros(1, 449, dtype=torch.int64), memory_BTD, torch.tensor([4]))


def test_waveforms_may_have_room_behind_the_longest_utterance(parts: Parts) -> None:
    audio_BS, lengths_B = pad_waves(noise(0.6))
    with torch.inference_mode():
        expected_BTD, _ = parts[0](*WhisperFeatures()(audio_BS, lengths_B))
        padded_BS = torch.nn.functional.pad(audio_BS, (0, 5000))
        found_BTD, _ = parts[0](*WhisperFeatures()(padded_BS, lengths_B))
    torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-5, rtol=0)
