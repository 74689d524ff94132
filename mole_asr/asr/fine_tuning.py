"""How a model with pretrained parts is trained: slowly where it was trained before, and not all of it at once."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from mole_asr.arguments import check_range
from mole_asr.asr.losses import ctc_loss
from mole_asr.asr.pretrained import PretrainedModel
from mole_asr.corpus.batch import Batch
from mole_asr.errors import MoleError

# The signs of all tokens stay where the pretraining put them: a small corpus uses few of them.
_EMBEDDING = "attention_head.decoder.embedding."
CTC_EPOCHS = 4  # after the blend; recipes/whisper_mole says what they bring
_NEW = re.compile(r"(mixture|ctc)\.|encoder\.blocks\.\d+\.feed_forward\.moe\.router\.")
_STEM = "encoder.stem."
_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class FineTuning:
    """Learning rates and stages of a model that stands on a pretrained one; AdamW (Loshchilov & Hutter, 2019).

    Attributes:
        lr: of the pretrained parts at the top of the encoder, and of its decoder.
        layer_decay: each encoder block below learns by this factor more slowly (ULMFiT, Howard & Ruder, 2018).
        frozen_blocks: encoder blocks, from the bottom, that are never trained, and with them the stem.
        new_lr: of the parts that start from nothing: CTC head, language tokenizer, routers.
        new_parts_share: share of all steps, at the beginning, in which only these are trained.
        weight_decay: decoupled, of all matrices.
        warmup_share: share of all steps in which a part's learning rate rises, from where its training begins.
        pretrained_share: how much of the pretrained weights the written model has: each weight that was pretrained is
            the mean, so weighed, of what it was and of what it has become (WiSE-FT, Wortsman et al., CVPR 2022). What
            was learned of a few voices is kept, and less is forgotten of all others. Then the CTC head, which is new,
            is fitted to what came out, for `CTC_EPOCHS`. Validation does not have it; a run that is complete is written
            anew, with another share too, when it is given again.
    """

    lr: float = 3e-5
    layer_decay: float = 0.85
    frozen_blocks: int = 0
    new_lr: float = 1e-3
    new_parts_share: float = 0.1
    weight_decay: float = 0.01
    warmup_share: float = 0.03
    pretrained_share: float = 0.0

    def __post_init__(self) -> None:
        if self.frozen_blocks < 0:
            raise MoleError(f"model.fine_tuning.frozen_blocks: {self.frozen_blocks} must not be negative")
        check_range("model.fine_tuning", 0, math.inf, lr=self.lr, new_lr=self.new_lr, weight_decay=self.weight_decay)
        check_range("model.fine_tuning", 0, 1, layer_decay=self.layer_decay, warmup_share=self.warmup_share)
        if not 0 <= self.pretrained_share < 1:
            raise MoleError(f"model.fine_tuning.pretrained_share: {self.pretrained_share:g} must be from 0 to below 1")
        if not 0 <= self.new_parts_share < 1:
            raise MoleError(f"model.fine_tuning.new_parts_share: {self.new_parts_share:g} must be from 0 to below 1")

    def rate(self, name: str, num_blocks: int) -> float:
        """Learning rate of a parameter by its name; 0 for one that is never trained.

        Args:
            name: in the model.
            num_blocks: encoder blocks.
        """
        if is_new(name):
            return self.new_lr
        found = _BLOCK.match(name)
        block = int(found[1]) if found else -1 if name.startswith(_STEM) else None
        is_frozen = block is not None and max(block, 0) < self.frozen_blocks
        if is_frozen or name.startswith(_EMBEDDING):
            return 0.0
        return self.lr * self.layer_decay ** (0 if block is None else num_blocks - 1 - block)

    def scale(self, step: int, steps: int, new: bool) -> float:
        """Learning rate of a step over the configured one: warm-up, then a straight line to zero at the last step."""
        first = 0 if new else round(self.new_parts_share * steps)
        warmup = max(1, round(self.warmup_share * steps))
        rising = min(1.0, max(0.0, (step + 1 - first) / warmup))
        return min(rising, max(0.0, (steps - step) / max(1, steps - warmup)))


def is_new(name: str) -> bool:
    """Whether the parameter of this name starts from nothing."""
    return bool(_NEW.match(name))


def choose_trained(model: nn.Module, num_blocks: int, config: FineTuning, step: int, steps: int) -> bool:
    """Lets gradients flow to the parameters that a step trains.

    Returns:
        Whether it trains the new parts alone.
    """
    new_only = step < round(config.new_parts_share * steps)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name) or (not new_only and config.rate(name, num_blocks) > 0))
    return new_only


def fine_tuning_optimizer(
    model: nn.Module, num_blocks: int, config: FineTuning, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a group a learning rate, and their schedules.

    Args:
        model: parameters that `FineTuning.rate` gives 0 are left out.
        num_blocks: encoder blocks.
        config: learning rates and stages.
        steps: of the whole training.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[config.rate(name, num_blocks), is_new(name), parameter.ndim > 1].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "weight_decay": config.weight_decay if decays else 0.0}
            for (rate, _, decays), parameters in groups.items()
            if rate > 0
        ],
        betas=(0.9, 0.98),
        fused=True,  # one pass over the weights: on a CPU, a step of 130 M parameters takes 0.3 s otherwise
    )
    scales: list[Callable[[int], float]] = [
        partial(config.scale, steps=steps, new=new) for rate, new, _ in groups if rate > 0
    ]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scales)


@torch.no_grad()
def blend(model: nn.Module, start: nn.Module, share: float) -> None:
    """Brings a trained model back towards what it started from, but for its new parts; see `FineTuning`.

    Args:
        model: is changed.
        start: the same model, untrained.
        share: of `start`, 0 to 1.
    """
    before = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        if not is_new(name):
            parameter.lerp_(before[name].to(parameter), share)


def fit_ctc_head(
    model: PretrainedModel,
    epochs: Sequence[Collection[Batch]],
    lr: float,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Fits the CTC head to an encoder that `blend` has changed under it; nothing else is trained.

    Args:
        model: is changed.
        epochs: batches of the training, on any device, once or several times.
        lr: of the first step; a straight line leads to zero behind the last.
        precision: makes the context in which the model is computed.
    """
    model.train().requires_grad_(False)
    head = model.ctc.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=sum(map(len, epochs)))
    for batch in chain.from_iterable(epochs):
        batch = batch.to(head.linear.weight.device)
        with precision():
            output = model(batch.audio_BS, batch.audio_lengths_B, batch.languages_B)
        ctc_loss(output.log_probs_BTV, output.lengths_B, batch).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
