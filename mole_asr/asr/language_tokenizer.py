"""The language tokenizer: which language is spoken, and how sure that is.

Letters: B batch, T frames, D model width, H hidden width, N languages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional

from mole_asr.asr.subsampling import windows
from mole_asr.moe.parts import PartedLinear, join


@dataclass(frozen=True)
class LanguageEvidence:
    """What the language tokenizer heard.

    Attributes:
        evidence_BTN: float32 logits of each frame; zero at padding.
        logits_BN: float32 logits of each utterance, the mean of its frames' evidence.
        hidden_BTH: what the last layer makes the evidence of; anything at padding.
        reliability_logits_B: float32, of the reliability head; None without one.
        reliability_logits_BT: the same a frame.
    """

    evidence_BTN: Tensor
    logits_BN: Tensor
    hidden_BTH: Tensor
    reliability_logits_B: Tensor | None = None
    reliability_logits_BT: Tensor | None = None

    def rows(self, utterances_R: Tensor) -> "LanguageEvidence":
        """The evidence of some utterances, int64 [R]."""
        reliability_B, reliability_BT = self.reliability_logits_B, self.reliability_logits_BT
        return LanguageEvidence(
            evidence_BTN=self.evidence_BTN[utterances_R],
            logits_BN=self.logits_BN[utterances_R],
            hidden_BTH=self.hidden_BTH[utterances_R],
            reliability_logits_B=None if reliability_B is None else reliability_B[utterances_R],
            reliability_logits_BT=None if reliability_BT is None else reliability_BT[utterances_R],
        )

    def mean_hidden(self, valid_BT: Tensor) -> Tensor:
        """The mean of `hidden_BTH` over the valid frames of each utterance, float32 [B, H]."""
        hidden_BTH = self.hidden_BTH.float().masked_fill(~valid_BT[:, :, None], 0.0)
        return hidden_BTH.sum(1) / valid_BT.sum(1, keepdim=True)

    def joined(self, trust_B: Tensor, opinion_BN: Tensor, valid_BT: Tensor) -> "LanguageEvidence":
        """The evidence, so much of it as is trusted, and what another witness adds to the logits of each utterance."""
        reliability_B, reliability_BT = self.reliability_logits_B, self.reliability_logits_BT
        return replace(
            self,
            evidence_BTN=trust_B[:, None, None] * self.evidence_BTN + opinion_BN[:, None] * valid_BT[:, :, None],
            logits_BN=trust_B[:, None] * self.logits_BN + opinion_BN,
            reliability_logits_B=None if reliability_B is None else trust_B * reliability_B,
            reliability_logits_BT=None if reliability_BT is None else trust_B[:, None] * reliability_BT,
        )

    def select(self, languages: Sequence[int]) -> "LanguageEvidence":
        """The evidence of some of the languages, in this order."""
        columns = list(languages)
        return replace(self, evidence_BTN=self.evidence_BTN[..., columns], logits_BN=self.logits_BN[:, columns])


class LanguageTokenizer(nn.Module):
    """A small convolutional classifier on an early layer of the encoder, computed once and shared by all MoLE blocks.

    MoLE (Kwon & Chung, arXiv 2302.13750) has a light language tokenizer that activates one language expert and
    estimates how reliable that is; its layers are not published. Ours: convolution -> linear -> mean over the
    utterance. As the last layer is linear, the mean of the frames' logits is the logit of the mean frame, so one set of
    weights gives decisions an utterance and a frame (code-switching).

    Args:
        d_model: D.
        num_languages: N.
        reliability: whether there is a head for the reliability "sigmoid".
        hidden: H.
    """

    def __init__(self, d_model: int, num_languages: int, reliability: bool = False, hidden: int = 96) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.convolution = nn.Linear(5 * d_model, hidden)
        self.languages = PartedLinear(hidden, num_languages)
        self.reliability = nn.Linear(hidden, 1) if reliability else None

    def forward(self, x_BTD: Tensor, lengths_B: Tensor, valid_BT: Tensor) -> LanguageEvidence:
        """Listens to frames; padding is not heard."""
        valid_BT1 = valid_BT[:, :, None]
        hidden_BTH = functional.silu(self.convolution(windows(self.norm(x_BTD) * valid_BT1, size=5)))
        pieces = [piece_BTn.float() * valid_BT1 for piece_BTn in self.languages.pieces(hidden_BTH)]
        evidence_BTN = join(pieces)
        logits_BN = join([piece_BTn.sum(1) for piece_BTn in pieces]) / lengths_B[:, None]
        if self.reliability is None:
            return LanguageEvidence(evidence_BTN, logits_BN, hidden_BTH)
        reliability_BT = self.reliability(hidden_BTH).squeeze(2).float() * valid_BT
        reliability_B = reliability_BT.sum(1) / lengths_B
        return LanguageEvidence(evidence_BTN, logits_BN, hidden_BTH, reliability_B, reliability_BT)
