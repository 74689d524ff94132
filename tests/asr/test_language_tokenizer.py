import torch

from mole_asr.asr.language_tokenizer import LanguageTokenizer
from mole_asr.audio.features import valid_mask


def heard(x_BTD: torch.Tensor, lengths_B: torch.Tensor):
    torch.manual_seed(0)
    module = LanguageTokenizer(x_BTD.shape[2], 3, reliability=True, hidden=12)
    return module(x_BTD, lengths_B, valid_mask(lengths_B, x_BTD.shape[1]))


def test_logits_are_the_mean_of_the_evidence_of_valid_frames() -> None:
    lengths_B = torch.tensor([9, 4, 1])
    evidence = heard(torch.randn(3, 9, 8), lengths_B)
    for b, length in enumerate(lengths_B.tolist()):
        assert evidence.evidence_BTN[b, :length].abs().sum() > 0
        assert not evidence.evidence_BTN[b, length:].any()
        torch.testing.assert_close(evidence.logits_BN[b], evidence.evidence_BTN[b, :length].mean(0))
        torch.testing.assert_close(evidence.reliability_logits_B[b], evidence.reliability_logits_BT[b, :length].mean())


def test_padding_is_not_heard() -> None:
    x_BTD, lengths_B = torch.randn(1, 5, 8), torch.tensor([5])
    alone = heard(x_BTD, lengths_B)
    garbage_BTD = torch.cat([x_BTD, 1e4 * torch.randn(1, 6, 8)], dim=1)
    padded = heard(garbage_BTD, lengths_B)
    torch.testing.assert_close(padded.logits_BN, alone.logits_BN)
    torch.testing.assert_close(padded.evidence_BTN[:, :5], alone.evidence_BTN)
    torch.testing.assert_close(padded.reliability_logits_B, alone.reliability_logits_B)


def test_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evidence = heard(torch.randn(2, 5, 8), torch.tensor([5, 3]))
    assert evidence.evidence_BTN.dtype == evidence.logits_BN.dtype == torch.float32
    assert evidence.reliability_logits_B.dtype == torch.float32
