"""The training losses, each under its name; the task sums them with its weights.

Letters: B batch, T frames, U labels, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.asr.model import EncoderConfig, ModelOutput
from mole_asr.corpus.batch import Batch
from mole_asr.moe.losses import language_loss, reliability_loss


def ctc_loss(log_probs_BTV: Tensor, lengths_B: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood of the labels, a label (Graves et al., 2006).

    A mean over labels, not over utterances, so that a step weighs long and short utterances by their content.
    """
    total = functional.ctc_loss(
        log_probs_BTV.transpose(0, 1),
        batch.labels_BU,
        lengths_B,
        batch.label_lengths_B,
        reduction="sum",
        zero_infinity=True,  # a recording may be a little shorter than its manifest says; the plan leaves out the rest
    )
    return total / batch.label_lengths_B.sum().clamp(min=1)


def losses(output: ModelOutput, batch: Batch, config: EncoderConfig) -> dict[str, Tensor]:
    """All losses of a batch by name: ctc, intermediate_ctc, language and, where trained, reliability.

    Args:
        output: of the model, in training.
        batch: the same batch.
        config: of the model.
    """
    by_frame = config.routing_unit == "frame"
    evidence, rows = output.evidence, output.frames.rows
    logits = evidence.evidence_BTN if by_frame else evidence.logits_BN
    named = {"ctc": ctc_loss(output.log_probs_BTV, output.lengths_B, batch)}
    if output.intermediate_log_probs_BTV:
        each = [ctc_loss(log_probs, output.lengths_B, batch) for log_probs in output.intermediate_log_probs_BTV]
        named["intermediate_ctc"] = torch.stack(each).mean()
    named["language"] = language_loss(logits, batch.languages_B, rows)
    heads = evidence.reliability_logits_BT if by_frame else evidence.reliability_logits_B
    if heads is not None:
        named["reliability"] = reliability_loss(heads, logits, batch.languages_B, rows)
    return named
