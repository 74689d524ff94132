"""Short trainings of a host: adaptation to ReLU and to fewer slices by distillation, and the loop that all share.

Letters: N valid tokens or frames, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mole_asr.convert.host import Host, Prediction
from mole_asr.errors import MoleError
from mole_asr.moe.convert.sliced import SlicedLayer
from mole_asr.moe.experts import Activation

RELU: dict[Activation, Activation] = {
    "gelu": "relu",
    "silu": "relu",
    "relu": "relu",
    "swiglu": "reglu",
    "geglu": "reglu",
    "reglu": "reglu",
}
"""What each activation becomes: ReLU in its place, or in that of its gate."""
_WARM_UP = 0.1
_CLIP = 1.0


def check_positive(**options: float) -> None:
    """Refuses rates that are not above zero, by the names of the options.

    Raises:
        MoleError: naming the first such option.
    """
    for name, value in options.items():
        if not value > 0:
            raise MoleError(f"--{name.replace('_', '-')} {value:g}: must be above 0")


def distillation_loss(student: Prediction, teacher: Prediction) -> Tensor:
    """Mean KL(teacher || student) over valid tokens or frames; without a head, the mean squared difference."""
    mine, theirs = student.outputs_NV.float(), teacher.outputs_NV.detach().float()
    if student.loss is None:
        return functional.mse_loss(mine, theirs)
    return functional.kl_div(mine.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")


def relu_adaptation(host: Host, batches: Sequence[Any], steps: int, lr: float = 1e-3, seed: int = 0) -> list[float]:
    """Gives the dense parts ReLU and trains the whole model to say what it said before.

    MoEfication adapts GELU models so, by going on with their training for some hundred steps; distillation from the
    model as it was needs no labels, and is ours.

    Args:
        host: with dense parts; it is changed.
        batches: of its training data.
        steps: optimizer steps.
        lr: of AdamW, at most.
        seed: of the order of the batches.

    Returns:
        The loss of each step.
    """
    teacher = host.clone()
    host.set_activation(RELU)
    return imitate(host, teacher, batches, steps, lr, seed)


def imitate(
    host: Host, teacher: Host, batches: Sequence[Any], steps: int, lr: float = 1e-3, seed: int = 0
) -> list[float]:
    """Trains a whole model to say what another one says; routers of slices stay as they were fitted.

    Args:
        host: it is changed.
        teacher: what it is to imitate; of the same kind.
        batches: of its training data.
        steps: optimizer steps.
        lr: of AdamW, at most.
        seed: of the order of the batches.

    Returns:
        The loss of each step.
    """

    def loss_of(batch: Any) -> Tensor:
        with torch.no_grad():
            expected = teacher.predict(batch)
        return distillation_loss(host.predict(batch), expected)

    routers = {id(parameter) for layer in host.layers().values() for parameter in _router_parameters(layer)}
    trained = [parameter for parameter in host.model.parameters() if id(parameter) not in routers]
    return train(host.model, [{"params": trained, "lr": lr}], batches, loss_of, steps, seed)


def _router_parameters(layer: SlicedLayer) -> list[nn.Parameter]:
    return [] if layer.router is None else list(layer.router.parameters())


def train(
    model: nn.Module,
    groups: Iterable[dict[str, Any]],
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor],
    steps: int,
    seed: int = 0,
) -> list[float]:
    """AdamW with linear warm-up and cosine decay, gradients clipped at 1; parameters in no group stay as they are.

    Parameters in a narrow type, such as bfloat16, are trained by copies in float32: most steps are smaller than the
    distance to their next value, and would be lost.

    Args:
        model: whose gradients are cleared at the end.
        groups: parameters and their learning rates.
        batches: all are seen before one is seen again.
        loss_of: a batch.
        steps: optimizer steps.
        seed: of the order.

    Returns:
        The loss of each step.

    Raises:
        MoleError: there are no batches, or the loss is no number any more.
    """
    if not batches:
        raise MoleError("nothing to train on: the data hold too little")
    pairs, wide_groups = _widened(groups)
    optimizer = torch.optim.AdamW(wide_groups, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))
    )
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses: list[float] = []
    for _, batch in zip(range(steps), _endless(batches, seed), strict=False):
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            raise MoleError(f"the loss of step {len(losses)} is no number; give a lower learning rate")
        model.zero_grad(set_to_none=True)
        loss.backward()
        for parameter, wide in pairs:
            wide.grad = None if parameter.grad is None else parameter.grad.to(wide.dtype)
        nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        with torch.no_grad():
            for parameter, wide in pairs:
                parameter.copy_(wide)
        schedule.step()
        losses.append(float(loss.detach()))
    model.zero_grad(set_to_none=True)
    return losses


def _widened(groups: Iterable[dict[str, Any]]) -> tuple[list[tuple[nn.Parameter, nn.Parameter]], list[dict[str, Any]]]:
    """Pairs (narrow parameter, its copy in float32), and the groups with the copies in the place of the narrow ones."""
    pairs, wide_groups = [], []
    for group in groups:
        parameters = []
        for parameter in group["params"]:
            if torch.finfo(parameter.dtype).bits < 32:
                pairs.append((parameter, nn.Parameter(parameter.detach().float())))
                parameter = pairs[-1][1]
            parameters.append(parameter)
        wide_groups.append(group | {"params": parameters})
    return pairs, wide_groups


def _endless(batches: Sequence[Any], seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]
