import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.asr.subsampling import Subsampling, windows
from mole_asr.audio.features import SUBSAMPLING, valid_mask


@given(frames=st.integers(1, 400))
@settings(max_examples=40, deadline=None)
def test_lengths_are_those_of_the_convolutions(frames: int) -> None:
    module = Subsampling(4, 8)
    x_BTD, lengths_B = module(torch.randn(1, frames, 4), torch.tensor([frames]))
    assert x_BTD.shape == (1, int(lengths_B), 8)
    assert int(lengths_B) == -(-frames // SUBSAMPLING)


@given(frames=st.integers(1, 20), size=st.sampled_from([1, 3, 5]), stride=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_a_linear_layer_on_windows_is_a_convolution(frames: int, size: int, stride: int) -> None:
    x_BTC, weight = torch.randn(2, frames, 3).double(), torch.randn(4, 3, size).double()
    expected = torch.nn.functional.conv1d(x_BTC.mT, weight, stride=stride, padding=size // 2).mT
    torch.testing.assert_close(windows(x_BTC, size, stride) @ weight.permute(2, 1, 0).reshape(-1, 4), expected)


def test_padding_changes_no_valid_frame() -> None:
    module = Subsampling(4, 8)
    for frames in range(1, 18):
        features_1TF = torch.randn(1, frames, 4)
        padded_1TF = torch.nn.functional.pad(features_1TF, (0, 0, 0, 23))
        alone_1TD, lengths_B = module(features_1TF, torch.tensor([frames]))
        padded_1TD, same_B = module(padded_1TF, torch.tensor([frames]))
        assert int(lengths_B) == int(same_B)
        torch.testing.assert_close(padded_1TD[:, : int(lengths_B)], alone_1TD)


def test_valid_mask() -> None:
    assert valid_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]
