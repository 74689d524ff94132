"""Muon for the matrices of the model, AdamW for all other parameters, in one optimizer.

torch.optim.Muon takes single matrices only: it cannot update a stack of experts, and on a CPU one matrix after another
costs more than the matrices of one shape together.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mole_asr.arguments import check_range

# Three odd quintics (a, b, c): each the best one, after those before it, to bring values of 0.015 to 1 near 1 (Polar
# Express, Amsel et al., 2025); nine tenths of the singular values met in training lie there. They come as near to 1 as
# after five steps of the usual polynomial (Jordan et al., 2024).
NEWTON_SCHULZ = ((7.8977, -22.8490, 16.8330), (3.4068, -2.5541, 0.5175), (2.3830, -1.7419, 0.4267))


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for the rest; warm-up, then a straight line to zero at the last step.

    A resumed run keeps the learning rates it began with.

    Attributes:
        lr: of the matrices.
        adamw_lr: of all other parameters.
        weight_decay: decoupled, of the matrices.
        warmup_share: share of all steps.
    """

    lr: float = 0.02
    adamw_lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_share: float = 0.03

    def __post_init__(self) -> None:
        """Refuses a rate that is negative or no number."""
        rates = {name: value for name, value in vars(self).items() if name != "warmup_share"}
        check_range("model.optimizer", 0, math.inf, **rates)
        check_range("model.optimizer", 0, 1, warmup_share=self.warmup_share)

    def scale(self, step: int, steps: int) -> float:
        """Learning rate of a step over the configured one."""
        warmup = max(1, round(self.warmup_share * steps))
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)))


def orthogonalize(matrices_NXY: Tensor) -> Tensor:
    """Replaces each matrix U S V^T of a stack by about U V^T, with a Newton-Schulz iteration in bfloat16.

    Args:
        matrices_NXY: any floating type.

    Returns:
        bfloat16 of the same shape; singular values near 1 (0.84 to 1.16, and rounding adds some), smaller where they
        were tiny beside the others.
    """
    tall = matrices_NXY.shape[-2] > matrices_NXY.shape[-1]
    x = (matrices_NXY / (torch.linalg.matrix_norm(matrices_NXY, keepdim=True) + 1e-7)).bfloat16()
    if tall:
        x = x.mT
    gram = x @ x.mT
    # The fourth root of the sum of S^4 bounds the largest singular value more tightly than the root of that of S^2
    # does; less shrunken values need fewer steps.
    norm_N11 = torch.linalg.matrix_norm(gram, keepdim=True).sqrt() + 1e-7
    gram = gram / norm_N11.square()
    for step, (a, b, c) in enumerate(NEWTON_SCHULZ):
        gram = gram if step == 0 else x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        x = (polynomial if step else polynomial / norm_N11) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices (Jordan et al., 2024); AdamW (Loshchilov & Hutter, 2019) for the rest.

    Args:
        matrices: parameters [X, Y] or stacks of them [E, X, Y].
        others: parameters for AdamW.
        lr: learning rate of the matrices.
        adamw_lr: learning rate of the others.
        momentum: of the matrices' gradients (Nesterov's).
        betas: of AdamW.
        weight_decay: decoupled, of the matrices.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float = 0.02,
        adamw_lr: float = 2e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:
        groups = [
            {"params": list(matrices), "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "muon": True},
            {"params": list(others), "lr": adamw_lr, "betas": betas, "muon": False},
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Makes one step with the gradients at hand; a parameter without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                self._step_matrices(parameters, group)
            elif parameters:
                self._step_adamw(parameters, group)
        return loss

    def _step_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape[-2:]].append(parameter)
        for (rows, columns), alike in by_shape.items():
            updates = []
            for parameter in alike:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                gradient = parameter.grad
                assert gradient is not None
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                updates.append(gradient.lerp(state["momentum"], group["momentum"]).view(-1, rows, columns))
            orthogonal_NXY = orthogonalize(torch.cat(updates)).to(alike[0].dtype)
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for parameter, update in zip(alike, orthogonal_NXY.split([len(update) for update in updates]), strict=True):
                decay = group["lr"] * group["weight_decay"]
                if parameter.ndim == 3:  # an expert that never heard anything keeps its weights; others have momentum
                    decay = decay * (update != 0).any(-1).any(-1)[:, None, None]
                parameter.mul_(1 - decay)
                parameter.add_(update.view_as(parameter), alpha=-rate)

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            state["step"] += 1
        beta1, beta2 = group["betas"]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means, squares = [state["mean"] for state in states], [state["square"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        steps = [state["step"] for state in states]  # fewer for a parameter that had no gradient at first
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_addcdiv_(parameters, means, roots, [-group["lr"] / (1 - beta1**step) for step in steps])


def build_optimizer(model: nn.Module, lr: float, adamw_lr: float, weight_decay: float) -> Muon:
    """Muon for every matrix inside the blocks, experts too; AdamW for routers, heads, norms, biases and the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = ".blocks." in f".{name}"
        is_matrix = parameter.ndim == 2 and name.endswith("weight") and ".router." not in name
        is_expert = name.split(".")[-1] in ("w1_EFD", "w2_EDF", "shared_w1_FD", "shared_w2_DF")
        (matrices if inside and (is_matrix or is_expert) else others).append(parameter)
    return Muon(matrices, others, lr=lr, adamw_lr=adamw_lr, weight_decay=weight_decay)
