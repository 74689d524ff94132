"""The training losses, each under its name; the task sums them with its weights.

Letters: B batch, T frames, U labels, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.asr.mixture import Decision
from mole_asr.asr.model import ModelOutput
from mole_asr.corpus.batch import Batch
from mole_asr.moe.losses import language_loss, load_balance_loss, reliability_loss


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
        zero_infinity=True,  # the plan leaves out what lacks frames, but for one or two that it counts too many
    )
    return total / batch.label_lengths_B.sum().clamp(min=1)


def mixture_losses(decision: Decision, languages_B: Tensor) -> dict[str, Tensor]:
    """Losses of the mixture of experts by name: language and, where they train something, reliability and balance.

    Args:
        decision: of a forward in training.
        languages_B: int64 true languages, -1 where unknown.
    """
    context = decision.context
    logits, rows = context.language_logits, context.rows
    assert logits is not None
    named = {"language": language_loss(logits, languages_B, rows)}
    if context.reliability_logits is not None:
        if decision.families is not None:
            logits, languages_B = decision.families.logits(logits), decision.families.of(languages_B)
        named["reliability"] = reliability_loss(context.reliability_logits, logits, languages_B, rows)
    # Where labels choose experts, balance comes from how languages are sampled.
    if decision.balances and decision.plans:
        named["balance"] = torch.stack([load_balance_loss(plan) for plan in decision.plans]).mean()
    return named


def losses(output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
    """All losses of a batch by name: ctc, where there are intermediate heads intermediate_ctc, those of the mixture.

    Args:
        output: of the model, in training.
        batch: the same batch.
    """
    named = {"ctc": ctc_loss(output.log_probs_BTV, output.lengths_B, batch)}
    if output.intermediate_log_probs_BTV:
        each = [ctc_loss(log_probs, output.lengths_B, batch) for log_probs in output.intermediate_log_probs_BTV]
        named["intermediate_ctc"] = torch.stack(each).mean()
    return named | mixture_losses(output.decision, batch.languages_B)
