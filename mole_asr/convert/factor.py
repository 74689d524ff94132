"""The `convert factor` verb: a trained model in few slices, whose routers learn what each is worth (FactorLLM)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mole_asr.arguments import check_at_least, check_seed
from mole_asr.convert.host import DensePart, Host, open_host
from mole_asr.convert.report import Conversion, lines_of
from mole_asr.convert.slicing import CUT_ROWS, SHOWN_ROWS, Cut, active_slices, output_error, slice_parts
from mole_asr.convert.speed import measure_speed
from mole_asr.convert.training import check_positive, train
from mole_asr.errors import MoleError, print_skipped
from mole_asr.files import check_output_folder
from mole_asr.moe.convert.sliced import RouterKind, SlicedLayer
from mole_asr.moe.convert.splits import Split
from mole_asr.moe.experts import feed_forward
from mole_asr.moe.losses import load_balance_loss, pseudo_label_loss
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.pseudo_labels import prior_approximate_labels
from mole_asr.moe.routers import PseudoLabelRouter, RoutingContext

Learning = Literal["prior", "end_to_end", "untrained", "oracle"]
KINDS: dict[Learning, RouterKind] = {
    "prior": "linear",
    "end_to_end": "linear",
    "untrained": "linear",
    "oracle": "prior_oracle",
}
ROUTE_WEIGHT, BALANCE_WEIGHT = 0.05, 0.01


class EndToEndRouter(PseudoLabelRouter):
    """The same choice and the same gates, through which the loss of the task reaches the router.

    The gate of a chosen slice is E / k times p / stop-gradient(p): its value does not depend on p, its gradient does.
    In logarithms, as p may be too small for a number.
    """

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows."""
        plan = super().forward(x_ND, context)
        log_p_NK = plan.aux["logits"].log_softmax(-1).gather(-1, plan.expert_ids.long())
        return replace(plan, gates=plan.gates * (log_p_NK - log_p_NK.detach()).exp())


def factor(
    model: str,
    output: str,
    *,
    data: str,
    slices: int = 4,
    share: float = 0.5,
    split: Split = "random",
    router: Learning = "prior",
    test: str | None = None,
    rows: int = 100_000,
    steps: int = 300,
    lr: float = 1e-3,
    router_lr: float = 1e-2,
    device: str = "cpu",
    seed: int = 0,
) -> Conversion:
    """Cuts the feed-forward parts of a trained model into few slices and trains slices and routers for a short time.

    Zhao et al., arXiv 2408.11855. A token gets the sum of its slices, scaled by how many there are over how many it
    has. All else of the model stays as it is. That all slices together are the dense part is checked before training.

    Args:
        model: folder of a language model or recogniser of ours, or of a Hugging Face model like Llama, BERT or T5.
        output: folder of the new model, which is used as the old one was; that of a Hugging Face model is opened by
            `mole_asr.convert.host.open_host(output).model`.
        data: what to train on: texts as `mole-asr prepare texts` writes them; for a recogniser, a manifest.
        slices: into which each feed-forward part is cut.
        share: of the slices that compute a token, 0 to 1.
        split: which neurons make a slice: contiguous, random, clusters, coactivation.
        router: prior learns which slices come closest to the dense output, end_to_end from the loss of the task,
            untrained not at all; oracle computes all slices to choose the closest: it is slow, and shows what the best
            router of this kind could do.
        test: other data, to measure how much quality is kept.
        rows: tokens or frames to take of the data.
        steps: optimizer steps.
        lr: learning rate of the slices, at most; recipes/factor takes three times as much for its small models.
        router_lr: of the routers, which start from nothing.
        device: where to compute and to time, such as "cuda".
        seed: of all that is drawn.

    Returns:
        What became of each part, speed and quality, and which recordings were skipped.

    Raises:
        MoleError: the model or the data cannot be read, or they and the options do not fit together.
    """
    check_output_folder(output, model)
    check_at_least(0, steps=steps)
    check_seed(seed)
    check_at_least(1, rows=rows)
    check_positive(lr=lr, router_lr=router_lr)
    cut = Cut(split, slices, active_slices(share, slices), KINDS[router], seed)
    host = open_host(model, device)
    host.check_uncut(model)
    parts = host.parts()
    batches = host.read(data, rows, seed)
    tests = [] if test is None else host.read(test, rows, seed)
    before = host.quality(tests) if tests else None
    heard = host.record(tests or batches, SHOWN_ROWS)
    torch.manual_seed(seed)  # routers start at random
    layers = slice_parts(parts, cut, host.record(batches, CUT_ROWS) if cut.needs_rows else heard)
    for name, layer in layers.items():
        host.put(name, layer)
    train_slices(host, parts, batches, router, steps, lr, router_lr, seed)
    errors = {name: output_error(part, layers[name], heard[name]) for name, part in parts.items()}
    speed = measure_speed(parts, layers, heard)
    after = host.quality(tests) if tests else None
    host.save(output)
    print_skipped(host.failures)
    return Conversion([*lines_of(layers, errors, speed, before, after), f"{output}: written"], host.failures)


def train_slices(
    host: Host,
    parts: Mapping[str, DensePart],
    batches: Sequence[Any],
    learning: Learning,
    steps: int,
    lr: float = 1e-3,
    router_lr: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Trains the slices and their routers by the task's loss, 0.05 of the route loss and 0.01 of the balance loss.

    Both are sums over layers. The balance loss is Switch's, for the mean of mask x softmax that the paper gives.

    Args:
        host: with slices in the place of all these parts.
        parts: the dense ones, whose outputs the labels come from.
        batches: to train on.
        learning: how the routers learn.
        steps: optimizer steps.
        lr: of the slices.
        router_lr: of the routers.
        seed: of the order of the batches.

    Returns:
        The loss of each step.

    Raises:
        MoleError: the model has no head that a loss could come from.
    """
    layers = host.layers()
    if learning == "end_to_end":
        for layer in layers.values():
            _replace_router(layer, EndToEndRouter)
    learns = learning in ("prior", "end_to_end")
    experts = [parameter for layer in layers.values() for parameter in layer.experts.parameters()]
    routers = [p for layer in layers.values() if layer.router is not None for p in layer.router.parameters()]
    groups: list[dict[str, Any]] = [{"params": experts, "lr": lr}]
    if learns:
        groups.append({"params": routers, "lr": router_lr})

    def loss_of(batch: Any) -> Tensor:
        with _routed(layers) as routed:
            found = host.predict(batch)
        if found.loss is None:
            raise MoleError("the model has no head for tokens, so there is no loss to train by; give one that has")
        total = found.loss
        for name, (x_ND, plan) in routed.items() if learns else ():
            x_ND, plan = _valid(x_ND, plan, found.valid_of(name))
            total = total + BALANCE_WEIGHT * load_balance_loss(plan)
            if learning == "prior":
                total = total + ROUTE_WEIGHT * route_loss(layers[name], parts[name], x_ND, plan)
        return total

    with _only(host.model, [parameter for group in groups for parameter in group["params"]]):
        losses = train(host.model, groups, batches, loss_of, steps, seed)
    if learning == "end_to_end":
        for layer in layers.values():
            _replace_router(layer, PseudoLabelRouter)
    return losses


def route_loss(layer: SlicedLayer, part: DensePart, x_ND: Tensor, plan: RoutingPlan) -> Tensor:
    """How far a router is from the Prior-Approximate labels: which slices come closest to the dense part's output."""
    with torch.no_grad():
        dense_ND = feed_forward(x_ND, part.weights._replace(b2_D=None), part.activation)
        # In float32, so that the differences from it are: in bfloat16 many slices would be equally far.
        dense_ND = dense_ND.to(torch.promote_types(dense_ND.dtype, torch.float32))
        labels_NE = prior_approximate_labels(x_ND, layer.experts, layer.config.active, dense_ND)
    return pseudo_label_loss(plan, labels_NE)


def _replace_router(layer: SlicedLayer, kind: type[PseudoLabelRouter]) -> None:
    old, config = layer.router, layer.config
    assert isinstance(old, PseudoLabelRouter)
    router = kind(config.d_model, config.slices, config.active).to(old.scores.weight)
    router.load_state_dict(old.state_dict())
    layer.choose_router("linear", config.active, router)


@contextmanager
def _routed(layers: Mapping[str, SlicedLayer]) -> Iterator[dict[str, tuple[Tensor, RoutingPlan]]]:
    """Yields the rows that each router gets first, and its plan: what is heard again is part of them."""
    found: dict[str, tuple[Tensor, RoutingPlan]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], RoutingPlan], None]:
        def note(module: nn.Module, arguments: tuple[Any, ...], plan: RoutingPlan) -> None:
            found.setdefault(name, (arguments[0].detach(), plan))

        return note

    handles = [layer.router.register_forward_hook(hook(name)) for name, layer in layers.items() if layer.router]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _valid(x_ND: Tensor, plan: RoutingPlan, mask_N: Tensor | None) -> tuple[Tensor, RoutingPlan]:
    """Without the rows of padding, where a part computed them too."""
    if mask_N is None or len(mask_N) != len(x_ND) or bool(mask_N.all()):
        return x_ND, plan
    aux = {name: values[mask_N] for name, values in plan.aux.items()}
    return x_ND[mask_N], replace(plan, expert_ids=plan.expert_ids[mask_N], gates=plan.gates[mask_N], aux=aux)


@contextmanager
def _only(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
