import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.audio.augment import AugmentConfig, SpecAugment, add_noise, augment, change_speed, telephone
from mole_asr.errors import MoleError

RATE_HZ = 16000
EVERYTHING = AugmentConfig(1.0, noise_probability=1.0, telephone_probability=1.0, gain_probability=1.0)
NOTHING = AugmentConfig(0.0, noise_probability=0.0, telephone_probability=0.0, gain_probability=0.0)


def tone(frequency_hz: float, seconds: float = 1.0) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * RATE_HZ)) / RATE_HZ).astype(np.float32)


def power_db(audio_S: np.ndarray, low_hz: float, high_hz: float) -> float:
    """Power between two frequencies; the ends, where filters run in, are not looked at."""
    middle_S = audio_S[1000:-1000] * np.hanning(len(audio_S) - 2000)
    frequencies_hz = np.fft.rfftfreq(len(middle_S), 1 / RATE_HZ)
    power = np.abs(np.fft.rfft(middle_S)) ** 2 / len(middle_S)
    return float(10 * np.log10(power[(frequencies_hz >= low_hz) & (frequencies_hz < high_hz)].sum() + 1e-12))


@pytest.mark.parametrize("speed", [0.9, 0.95, 1.05, 1.1])
@pytest.mark.parametrize("frequency_hz", [200, 1000, 5000])
def test_speed_moves_pitch_and_length_and_adds_nothing_else(speed: float, frequency_hz: int) -> None:
    faster_S = change_speed(tone(frequency_hz), speed, RATE_HZ)
    assert faster_S.dtype == np.float32
    assert len(faster_S) == pytest.approx(RATE_HZ / speed, abs=1.5)
    moved = frequency_hz * speed
    inside, outside = power_db(faster_S, moved - 20, moved + 20), power_db(faster_S, moved + 60, 8000)
    assert inside - outside > 40


def test_speed_does_not_fold_high_frequencies_down() -> None:
    aliased_S = change_speed(tone(7900), 1.1, RATE_HZ)  # would be 8,690 Hz, which 16 kHz cannot hold
    assert power_db(aliased_S, 0, 8000) < power_db(tone(7900), 0, 8000) - 9.5  # linear interpolation: 7.8


@given(snr_db=st.floats(-5, 40), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_noise_has_the_wanted_level(snr_db: float, seed: int) -> None:
    clean_S = tone(440, 4.0)
    noise_S = add_noise(clean_S, snr_db, np.random.default_rng(seed)) - clean_S
    measured = 10 * np.log10(np.mean(clean_S**2) / np.mean(noise_S**2))
    assert measured == pytest.approx(snr_db, abs=2.5)  # pink noise has slow parts: a few seconds vary


def test_noise_is_white_or_pink() -> None:
    slopes = set()
    for seed in range(12):
        noise_S = add_noise(tone(440, 4.0), -40, np.random.default_rng(seed))
        slopes.add(round((power_db(noise_S, 100, 200) - power_db(noise_S, 3200, 6400)) / 5))  # five octaves
    assert slopes == {-3, 0}, "an octave higher has twice the white power (+3 dB) or the same pink power"


def test_a_telephone_keeps_its_band_and_its_length() -> None:
    for frequency_hz, passes in (500, True), (2500, True), (5000, False), (7000, False):
        heard_S = telephone(tone(frequency_hz)[:15999], RATE_HZ)
        assert len(heard_S) == 15999 and heard_S.dtype == np.float32
        loss_db = power_db(tone(frequency_hz), 0, 8000) - power_db(heard_S, frequency_hz - 50, frequency_hz + 50)
        assert loss_db < 1 if passes else loss_db > 25


def test_mu_law_is_heard_but_soft() -> None:
    error_S = (telephone(tone(500), RATE_HZ) - tone(500))[1000:-1000]
    snr_db = 10 * np.log10(np.mean(tone(500) ** 2) / np.mean(error_S**2))
    assert 25 < snr_db < 50


@given(seconds=st.floats(0.05, 3.0), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_augmented_audio_is_finite_seeded_and_bounded_in_length(seconds: float, seed: int) -> None:
    audio_S = tone(300, seconds)
    before_S = audio_S.copy()
    first_S, again_S = (augment(audio_S, EVERYTHING, np.random.default_rng(seed), RATE_HZ) for _ in range(2))
    np.testing.assert_array_equal(first_S, again_S)
    np.testing.assert_array_equal(audio_S, before_S)
    assert first_S.dtype == np.float32 and np.isfinite(first_S).all()
    assert len(audio_S) * EVERYTHING.shortest_stretch - 2 < len(first_S) < len(audio_S) * EVERYTHING.longest_stretch + 2


def test_seeds_differ_and_probability_zero_changes_nothing() -> None:
    versions = {augment(tone(300), EVERYTHING, np.random.default_rng(seed), RATE_HZ).tobytes() for seed in range(5)}
    assert len(versions) == 5
    np.testing.assert_array_equal(augment(tone(300), NOTHING, np.random.default_rng(0), RATE_HZ), tone(300))
    assert NOTHING.longest_stretch == NOTHING.shortest_stretch == 1.0


def test_silence_stays_finite() -> None:
    silence_S = augment(np.zeros(800, np.float32), EVERYTHING, np.random.default_rng(0), RATE_HZ)
    assert np.isfinite(silence_S).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"speed_probability": 1.5},
        {"speeds": ()},
        {"speeds": (0.1,)},
        {"min_snr_db": 50.0},
        {"max_snr_db": math.inf},
        {"min_gain_db": math.nan},
        {"min_gain_db": 7.0},
    ],
)
def test_bad_settings_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(MoleError, match=next(iter(bad))):
        AugmentConfig(**bad)  # type: ignore[arg-type]


# --- SpecAugment


def masked(features_BTF: torch.Tensor, lengths_B: torch.Tensor, seed: int = 0, **config: float) -> torch.Tensor:
    return SpecAugment(**config)(features_BTF, lengths_B, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def features(lengths: list[int], bins: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(len(lengths), max(lengths), bins, generator=torch.Generator().manual_seed(1)), torch.tensor(
        lengths
    )


def test_evaluation_changes_nothing() -> None:
    features_BTF, lengths_B = features([100, 50])
    assert SpecAugment().eval()(features_BTF, lengths_B) is features_BTF


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_masks_are_bands_and_stretches_of_bounded_size(lengths: list[int], seed: int) -> None:
    features_BTF, lengths_B = features(lengths)
    before_BTF = features_BTF.clone()
    changed_BTF = masked(features_BTF, lengths_B, seed) != features_BTF
    assert torch.equal(features_BTF, before_BTF)
    for changed_TF, length in zip(changed_BTF, lengths, strict=True):
        assert not changed_TF[length:].any(), "padding was touched"
        times_T, bands_F = changed_TF[:length].all(1), changed_TF[:length].all(0)
        if not bands_F.all() and not times_T.all():
            assert torch.equal(changed_TF[:length], times_T[:, None] | bands_F[None, :])
        limits = SpecAugment()
        assert bands_F.sum() <= limits.frequency_masks * limits.max_frequency_bins or times_T.all()
        masks = min(limits.max_time_masks, int(length * limits.time_masks_per_frame))
        assert times_T.sum() <= masks * int(length * limits.max_time_share) or bands_F.all()


def test_a_mask_is_the_mean_of_the_valid_frames() -> None:
    features_BTF, lengths_B = features([200, 120])
    features_BTF[1, 120:] = 1e6
    masked_BTF = masked(features_BTF, lengths_B)
    for i, length in enumerate([200, 120]):
        values = masked_BTF[i][masked_BTF[i] != features_BTF[i]]
        assert len(values) > 0
        torch.testing.assert_close(values, features_BTF[i, :length].mean().expand_as(values), atol=1e-5, rtol=1e-4)


def test_masking_is_seeded_and_differs_between_utterances() -> None:
    features_BTF, lengths_B = features([200, 200])
    assert torch.equal(masked(features_BTF, lengths_B, 3), masked(features_BTF, lengths_B, 3))
    assert not torch.equal(masked(features_BTF, lengths_B, 3), masked(features_BTF, lengths_B, 4))
    changed_BTF = masked(features_BTF, lengths_B, 3) != features_BTF
    assert not torch.equal(changed_BTF[0], changed_BTF[1])


def test_over_many_seeds_every_bin_and_frame_is_masked_sometimes() -> None:
    features_BTF, lengths_B = features([300] * 64)
    changed_BTF = torch.zeros_like(features_BTF, dtype=torch.bool)
    for seed in range(10):
        changed_BTF |= masked(features_BTF, lengths_B, seed) != features_BTF
    times_T = masked(features_BTF, lengths_B, frequency_masks=0) != features_BTF
    assert changed_BTF.any(0).all()
    assert 0.01 < times_T.float().mean() < 0.15


def test_masks_of_half_precision_features_keep_their_type() -> None:
    features_BTF, lengths_B = features([100])
    assert masked(features_BTF.bfloat16(), lengths_B).dtype == torch.bfloat16
