import numpy as np
import pytest
import torch

from mole_asr.audio.features import LogMel


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("samples", [160, 1600, 4001, 16000, 16079])
def test_padding_changes_no_frame(samples: int) -> None:
    log_mel, audio_1S = LogMel(num_mels=20), noise(samples)
    alone_1TF, frames_1 = log_mel(audio_1S, torch.tensor([samples]))
    assert alone_1TF.shape == (1, int(frames_1), 20)
    assert int(frames_1) == samples // 160 + 1
    both_2S = torch.zeros(2, samples + 5000)
    both_2S[0, :samples] = audio_1S
    both_2S[1] = noise(samples + 5000, seed=1)
    together_2TF, frames_2 = log_mel(both_2S, torch.tensor([samples, samples + 5000]))
    assert int(frames_2[0]) == int(frames_1)
    torch.testing.assert_close(together_2TF[:1, : int(frames_1)], alone_1TF, atol=1e-4, rtol=0)
    assert not together_2TF[0, int(frames_1) :].any()


@pytest.mark.parametrize("gain", [0.05, 0.5, 8.0])
def test_level_does_not_matter(gain: float) -> None:
    log_mel, audio_1S, length_1 = LogMel(num_mels=20), noise(16000), torch.tensor([16000])
    torch.testing.assert_close(log_mel(gain * audio_1S, length_1)[0], log_mel(audio_1S, length_1)[0], atol=0.03, rtol=0)


def test_normalised_over_valid_frames() -> None:
    features_1TF, frames_1 = LogMel(num_mels=20)(noise(16000), torch.tensor([12000]))
    # The audio beyond the length is noise here: the mean and the variance must not have seen it.
    valid_TF = features_1TF[0, : int(frames_1)]
    torch.testing.assert_close(valid_TF.mean(0), torch.zeros(20), atol=1e-4, rtol=0)
    assert float(valid_TF.square().mean()) == pytest.approx(1, abs=1e-3)


def test_silence_is_finite_and_flat() -> None:
    features_1TF, _ = LogMel(num_mels=20)(torch.zeros(1, 8000), torch.tensor([8000]))
    assert torch.isfinite(features_1TF).all()
    assert float(features_1TF.abs().max()) < 1e-2


def test_a_tone_is_in_its_band_at_its_time() -> None:
    time_S = np.arange(16000) / 16000
    audio_S = np.where(time_S < 0.5, np.sin(2 * np.pi * 400 * time_S), np.sin(2 * np.pi * 3000 * time_S))
    features_1TF, _ = LogMel(num_mels=40)(torch.from_numpy(audio_S.astype(np.float32))[None], torch.tensor([16000]))
    low, high = features_1TF[0, 10:40].mean(0).argmax(), features_1TF[0, 60:90].mean(0).argmax()
    assert low < high


def test_float32_under_autocast_and_without_state() -> None:
    log_mel = LogMel(num_mels=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features_1TF, _ = log_mel(noise(8000), torch.tensor([8000]))
    assert features_1TF.dtype == torch.float32
    torch.testing.assert_close(features_1TF, log_mel(noise(8000), torch.tensor([8000]))[0])
    assert log_mel.state_dict() == {}
