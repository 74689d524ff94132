"""What holds for every router, through a whole layer, whatever backend computes it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from mole_asr.moe import (
    AdaptiveRouter,
    CentroidRouter,
    ExpertChoiceRouter,
    ForcedLabelRouter,
    LanguageGroupRouter,
    LanguageRouter,
    MLPRouter,
    MoELayer,
    NoisyTopKRouter,
    OracleRouter,
    PackedRows,
    PseudoLabelRouter,
    Router,
    RoutingContext,
    RoutingPlan,
    TopKRouter,
)
from mole_asr.moe import losses as loss_functions
from mole_asr.moe.experts import feed_forward
from mole_asr.moe.pseudo_labels import activation_mass, prior_approximate_labels
from mole_asr.moe.statistics import loads_by_language, routing_statistics

D = 6
LENGTHS = [3, 0, 6, 1, 4]


def groups(num_experts: int) -> int:
    return 2 if num_experts % 2 == 0 else 1


# Router of E experts and K of them a row, where the router has a K.
ROUTERS: dict[str, Callable[[int, int], Router]] = {
    "top_k": lambda e, k: TopKRouter(D, e, k, shared_expert=True),
    "top_k_raw": lambda e, k: TopKRouter(D, e, k, renormalize=False, noise_std=0.5),
    "noisy": lambda e, k: NoisyTopKRouter(D, e, k, temperature=0.7),
    "adaptive": lambda e, k: AdaptiveRouter(D, e, 0.1),
    "adaptive_renormalized": lambda e, k: AdaptiveRouter(D, e, 0.3, renormalize=True, shared_expert=True),
    "expert_choice": lambda e, k: ExpertChoiceRouter(D, e, k),
    "language": lambda e, k: LanguageRouter(e),
    "language_frame": lambda e, k: LanguageRouter(e, "entropy"),
    "language_gumbel": lambda e, k: LanguageRouter(e, "gumbel", routing="scheduled"),
    "family": lambda e, k: LanguageRouter(2 * e, families=[*range(e), *range(e)], routing="true"),
    "language_generations": lambda e, k: LanguageRouter(2 * e, families=[*range(e), *range(e)], parts=(e, e)),
    "group": lambda e, k: LanguageGroupRouter(D, groups(e), e // groups(e), min(k, e // groups(e))),
    "group_frame": lambda e, k: LanguageGroupRouter(D, groups(e), e // groups(e), 1, renormalize=False),
    "forced": lambda e, k: ForcedLabelRouter(D, e, max(k, min(2, e))),
    "centroid": lambda e, k: CentroidRouter(torch.randn(e, D), k),
    "mlp": lambda e, k: MLPRouter(torch.randn(e, D), k),
    "oracle": lambda e, k: OracleRouter(make_layer("top_k", e, k).experts, k),  # replaced by that of its layer
    "pseudo_label": lambda e, k: PseudoLabelRouter(D, e, k),
}
FRAME_LOGITS = {"language_frame", "group_frame"}
SEGMENTS = {"language", "language_gumbel", "family", "language_generations"}


def make_layer(name: str, num_experts: int = 4, k: int = 2) -> MoELayer:
    router = ROUTERS[name](num_experts, k)
    layer = MoELayer(D, 5, num_experts, router, shared_expert=True).double()
    if name == "oracle":
        layer.router = OracleRouter(layer.experts, k)
    if name == "noisy":
        torch.nn.init.normal_(router.noise.weight)
    return layer


class Batch:
    """A padded batch, and what a router may look at."""

    def __init__(self, name: str, layer: MoELayer, lengths: list[int], seed: int = 0) -> None:
        draws = torch.Generator().manual_seed(seed)
        num_languages = getattr(layer.router, "num_languages", layer.experts.num_experts)
        batch, frames = len(lengths), max(lengths, default=0)
        shape = (batch, frames, num_languages) if name in FRAME_LOGITS else (batch, num_languages)
        self.lengths_B = torch.tensor(lengths, dtype=torch.long)
        self.x_BTD = torch.randn(batch, frames, D, generator=draws, dtype=torch.float64)
        self.logits = torch.randn(shape, generator=draws, dtype=torch.float64)
        self.languages_B = torch.randint(-1, num_languages, (batch,), generator=draws)

    def padding(self) -> Tensor:
        return torch.arange(self.x_BTD.shape[1]) >= self.lengths_B[:, None]

    def context(self, seed: int = 1) -> RoutingContext:
        rows = PackedRows.from_lengths(self.lengths_B, self.x_BTD.shape[1])
        return RoutingContext(rows, self.logits, self.languages_B, 0.5, generator=torch.Generator().manual_seed(seed))

    def run(self, layer: MoELayer, backend: str = "auto") -> tuple[Tensor, RoutingPlan]:
        layer.backend = backend
        context = self.context()
        return layer(self.x_BTD, rows=context.rows, context=context)

    def gradients(self, layer: MoELayer, backend: str = "auto") -> dict[str, Tensor]:
        """The output, and the gradient of a lopsided loss in rows, language logits and parameters."""
        self.x_BTD, self.logits = (t.detach().requires_grad_() for t in (self.x_BTD, self.logits))
        y_BTD, _ = self.run(layer, backend)
        inputs = {"x": self.x_BTD, "language_logits": self.logits, **dict(layer.named_parameters())}
        weights = torch.linspace(-1, 2, y_BTD.numel(), dtype=torch.float64).view_as(y_BTD)
        total = (y_BTD * weights).sum() + 0 * sum(i.sum() for i in inputs.values())
        found = torch.autograd.grad(total, list(inputs.values()))
        return {"output": y_BTD, **dict(zip(inputs, found, strict=True))}


def backends(name: str) -> list[str]:
    return ["cpu_tiled", "segment"] if name in SEGMENTS else ["cpu_tiled"]


def losses_of(plan: RoutingPlan) -> dict[str, Tensor]:
    """Every loss that this plan has what is needed for."""
    found = {"importance": loss_functions.importance_loss(plan), "load": loss_functions.load_loss(plan)}
    if "probabilities" in plan.aux:
        found["balance"] = loss_functions.load_balance_loss(plan)
        found["balance_alone"] = loss_functions.load_balance_loss(plan, one_expert_only=True)
    if "logits" in plan.aux:
        found["z"] = loss_functions.router_z_loss(plan)
    return found


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: float) -> None:
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ROUTERS)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6), st.data())
def test_backends_agree_in_values_and_gradients(name: str, seed: int, num_experts: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    layer = make_layer(name, num_experts, data.draw(st.integers(1, num_experts)))
    layer.train(data.draw(st.booleans()))
    batch = Batch(name, layer, data.draw(st.lists(st.integers(0, 7), max_size=5)), seed)
    expected = batch.gradients(layer, "reference")
    for backend in backends(name):
        assert_same(batch.gradients(layer, backend), expected)


CORNERS = {
    "no utterance": ([], 4, 2),
    "no rows": ([0, 0], 4, 2),
    "one row": ([1], 4, 2),
    "one expert": (LENGTHS, 1, 1),
    "all experts": (LENGTHS, 4, 4),
}


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("name", ROUTERS)
def test_corners(name: str, corner: str) -> None:
    lengths, num_experts, k = CORNERS[corner]
    layer = make_layer(name, num_experts, k)
    batch = Batch(name, layer, lengths)
    expected = batch.gradients(layer, "reference")
    assert all(tensor.isfinite().all() for tensor in expected.values())
    for backend in backends(name):
        assert_same(batch.gradients(layer, backend), expected)
    _, plan = batch.run(layer)
    plan.check_ids()
    statistics = routing_statistics(plan, sum(lengths))
    for figure in (*losses_of(plan).values(), *vars(statistics).values()):
        assert figure.isfinite().all()
    if not sum(lengths):
        assert statistics.load_E.sum() == 0 and statistics.reliability == 0
    if num_experts == 1:
        assert statistics.load_E.tolist() == [1.0] and statistics.load_entropy == 0


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
def test_all_rows_to_one_expert_leaves_the_others_without_any_gradient(name: str) -> None:
    layer = make_layer(name, k=1).eval()  # in training labels and noise spread the rows
    batch = Batch(name, layer, LENGTHS)
    batch.languages_B[:] = 1
    for tensor in (batch.x_BTD, batch.logits):
        tensor[:] = torch.randn(tensor.shape[-1], dtype=torch.float64)
    _, plan = batch.run(layer)
    used = {expert for expert in plan.expert_ids.unique().tolist() if expert < 4}
    assert len(used) == (2 if name == "forced" else 1) or name.startswith("adaptive")
    unused = sorted(set(range(4)) - used)
    for backend in ["reference", *backends(name)]:
        found = batch.gradients(layer, backend)
        for tensor in ("w1_EFD", "b1_EF", "w2_EDF", "b2_ED"):
            gradient = found[f"experts.{tensor}"]
            assert torch.count_nonzero(gradient[unused]) == 0 and gradient[sorted(used)].abs().sum() > 0
    load_E = routing_statistics(plan, sum(LENGTHS)).load_E
    torch.testing.assert_close(load_E[sorted(used)], torch.full((len(used),), 1 / len(used)))


@pytest.mark.parametrize("name", ROUTERS)
def test_evaluation_is_deterministic_and_needs_no_draws(name: str) -> None:
    layer = make_layer(name).eval()
    batch = Batch(name, layer, LENGTHS)
    for backend in ["reference", *backends(name)]:
        layer.backend = backend
        results = []
        for seed in (1, 2):
            context = batch.context(seed)
            y_BTD, plan = layer(batch.x_BTD, rows=context.rows, context=context)
            results.append([y_BTD, plan.expert_ids, plan.gates, *plan.aux.values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ROUTERS)
def test_permuting_the_batch_permutes_the_output(name: str) -> None:
    layer = make_layer(name).eval()
    batch = Batch(name, layer, [1] * 30 + LENGTHS)  # utterances of one row: any order of rows
    order = torch.randperm(len(batch.lengths_B))
    for backend in ["reference", *backends(name)]:
        y_BTD, plan = batch.run(layer, backend)
        permuted = Batch(name, layer, batch.lengths_B[order].tolist())
        permuted.x_BTD, permuted.logits = batch.x_BTD[order], batch.logits[order]
        permuted.languages_B = batch.languages_B[order]
        z_BTD, permuted_plan = permuted.run(layer, backend)
        torch.testing.assert_close(z_BTD, y_BTD[order])
        assert_same(losses_of(permuted_plan), losses_of(plan))


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
def test_an_utterance_gets_alone_what_it_gets_in_a_batch(name: str) -> None:
    layer = make_layer(name).eval()
    batch = Batch(name, layer, LENGTHS)
    y_BTD, _ = batch.run(layer)
    for row, length in enumerate(LENGTHS):
        alone = Batch(name, layer, [length])
        alone.x_BTD = batch.x_BTD[row : row + 1, :length]
        alone.logits = batch.logits[row : row + 1]
        alone.logits = alone.logits[:, :length] if name in FRAME_LOGITS else alone.logits
        alone.languages_B = batch.languages_B[row : row + 1]
        torch.testing.assert_close(alone.run(layer)[0][0], y_BTD[row, :length])


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_touches_neither_output_nor_gradient_nor_losses_nor_statistics(name: str) -> None:
    layer = make_layer(name).train()
    results = []
    for fill in (0.0, torch.nan):
        batch = Batch(name, layer, LENGTHS)
        batch.x_BTD[batch.padding()] = fill
        if name in FRAME_LOGITS:
            batch.logits[batch.padding()] = fill
        found = batch.gradients(layer)
        _, plan = batch.run(layer)
        losses = losses_of(plan)
        inputs = [batch.x_BTD, batch.logits, *layer.router.parameters()]
        by_losses = torch.autograd.grad(
            sum(losses.values()) + 0 * batch.x_BTD.nan_to_num().sum(), inputs, allow_unused=True
        )
        labels = batch.languages_B if plan.layout == "segment" else batch.languages_B.repeat_interleave(batch.lengths_B)
        found |= losses | vars(routing_statistics(plan, sum(LENGTHS)))
        found |= {f"losses to input {i}": gradient for i, gradient in enumerate(by_losses) if gradient is not None}
        found["by language"] = loads_by_language(plan, labels, 8)
        results.append(found)
    for key, with_zeros in results[0].items():
        assert torch.equal(with_zeros, results[1][key]), key
    padding = batch.padding()
    assert torch.count_nonzero(results[0]["output"][padding]) == 0
    assert torch.count_nonzero(results[0]["x"][padding]) == 0


# Does the output's gradient reach (the router's parameters, the language logits)?
REACHES = {
    "top_k": (True, False),
    "top_k_raw": (True, False),
    "noisy": (True, False),
    "adaptive": (True, False),
    "adaptive_renormalized": (True, False),
    "expert_choice": (True, False),
    "language": (False, True),
    "language_frame": (False, True),
    "language_gumbel": (False, True),
    "family": (False, True),
    "language_generations": (False, True),
    "group": (True, False),  # DLG-MoE: the language posterior never weighs the output
    "group_frame": (True, False),
    "forced": (True, False),
    "centroid": (False, False),
    "mlp": (False, False),
    "oracle": (False, False),
    "pseudo_label": (False, False),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_the_output_has_a_gradient_to_the_router_exactly_where_it_should(name: str, training: bool) -> None:
    layer = make_layer(name).train(training)
    batch = Batch(name, layer, LENGTHS)
    for backend in ["reference", *backends(name)]:
        found = batch.gradients(layer, backend)
        if name == "noisy" and not training:  # no noise in evaluation
            assert torch.count_nonzero(found.pop("router.noise.weight")) == 0
        router = [gradient for key, gradient in found.items() if key.startswith("router.")]
        reaches = (bool(router) and all(g.abs().sum() > 0 for g in router), found["language_logits"].abs().sum() > 0)
        assert reaches == REACHES[name]
        assert REACHES[name][0] or not any(torch.count_nonzero(g) for g in router)


# What reaches the router's parameters (for language routers the language logits) of the losses, beside the output.
USUAL = {"importance", "balance", "z"}
REACHED_BY = {
    **{name: USUAL for name in ROUTERS},
    "top_k_raw": USUAL | {"load"},
    "noisy": USUAL | {"load"},
    "expert_choice": USUAL - {"balance"},  # balanced by construction
    "mlp": {"z"},
    "pseudo_label": {"balance", "z"},
    "centroid": set(),
    "oracle": set(),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_losses_reach_the_router_where_they_should(name: str) -> None:
    layer = make_layer(name, 6)
    batch = Batch(name, layer, LENGTHS)
    batch.logits.requires_grad_()
    _, plan = batch.run(layer)
    inputs = [batch.logits] if name.startswith(("language", "family")) else list(layer.router.parameters())
    reached = set()
    for loss, value in losses_of(plan).items():
        found = [None]
        if value.requires_grad:
            found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
        if any(gradient is not None and gradient.abs().max() > 1e-9 for gradient in found):
            reached.add(loss)
    assert reached - {"balance_alone"} == REACHED_BY[name]


def test_slice_routers_learn_from_their_pseudo_labels() -> None:
    for name in ("mlp", "pseudo_label"):
        layer = make_layer(name)
        x_ND = torch.randn(50, D, dtype=torch.float64)
        plan = layer.router(x_ND)
        if name == "mlp":
            loss = loss_functions.activation_loss(plan, activation_mass(x_ND, layer.experts))
        else:
            loss = loss_functions.pseudo_label_loss(plan, prior_approximate_labels(x_ND, layer.experts, 2))
        gradients = torch.autograd.grad(
            loss, [*layer.router.parameters(), *layer.experts.parameters()], allow_unused=True
        )
        own = len(list(layer.router.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients[:own])
        assert all(gradient is None for gradient in gradients[own:])


@pytest.mark.parametrize("name", ["top_k", "top_k_raw", "noisy", "forced", "pseudo_label", "mlp", "oracle"])
def test_all_experts_are_the_dense_mixture(name: str) -> None:
    layer = make_layer(name, 4, 4).eval()
    batch = Batch(name, layer, LENGTHS)
    plan = batch.run(layer)[1]
    x_ND = batch.context().rows.pack(batch.x_BTD)
    outputs = torch.stack([feed_forward(x_ND, weights, "silu") for weights in layer.experts.unbind()])
    temperature = 0.7 if name == "noisy" else 1.0
    weights_NE = torch.ones(len(x_ND), 4, dtype=torch.float64)
    if REACHES[name][0]:
        weights_NE = (x_ND @ layer.router.scores.weight.t() / temperature).softmax(-1)
    expected_ND = torch.einsum("ne,end->nd", weights_NE, outputs)
    if plan.shared_gates is not None:
        expected_ND = expected_ND + feed_forward(x_ND, layer.experts.shared_weights(), "silu")
    for backend in ["reference", "cpu_tiled"]:
        found_ND = batch.context().rows.pack(batch.run(layer, backend)[0])
        torch.testing.assert_close(found_ND, expected_ND, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ROUTERS)
def test_decisions_are_made_in_float32_under_autocast(name: str) -> None:
    layer = make_layer(name).float().eval()
    batch = Batch(name, layer, [40])
    batch.x_BTD, batch.logits = batch.x_BTD.float(), batch.logits.float()
    _, plain = batch.run(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, low = batch.run(layer)
    assert y_BTD.dtype == torch.float32
    assert torch.equal(low.expert_ids, plain.expert_ids)
    assert low.gates.dtype == torch.float32 and torch.equal(low.gates, plain.gates)
    assert all(torch.equal(low.aux[key], plain.aux[key]) for key in plain.aux)
    # Rows and weights of a lower precision give float32 too.
    batch.x_BTD, batch.logits = batch.x_BTD.bfloat16(), batch.logits.bfloat16()
    _, low = batch.run(layer.bfloat16())
    assert low.gates.dtype == torch.float32
    assert all(low.aux[key].dtype in (torch.float32, torch.int64) for key in low.aux)


def route(name: str, layer: MoELayer, context: RoutingContext, x_ND: Tensor) -> None:
    """Router, losses and statistics."""
    assert context.languages_B is not None
    labels_U = context.languages_B if name in SEGMENTS else context.languages_B[context.rows.utterance_of_row]
    plan = layer.router(x_ND, context)
    sum(losses_of(plan).values())
    routing_statistics(plan, len(x_ND))
    loads_by_language(plan, labels_U, 8)
    if name == "mlp":
        loss_functions.activation_loss(plan, activation_mass(x_ND, layer.experts))
    if name == "pseudo_label":
        loss_functions.pseudo_label_loss(plan, prior_approximate_labels(x_ND, layer.experts, 2))


def moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> tuple[RoutingContext, Tensor]:
    """The context and the rows elsewhere; how many rows there are is known before."""
    rows = batch.context().rows
    rows = PackedRows(move(rows.lengths_B), rows.num_frames, move(rows.index_N), move(rows.segments_B1))
    return RoutingContext(rows, move(batch.logits), move(batch.languages_B), 0.5), rows.pack(move(batch.x_BTD))


@pytest.mark.parametrize("name", ROUTERS)
def test_nothing_needs_values_on_the_host(name: str) -> None:
    # Fake tensors have shapes and no values: whatever needs a value or a shape that depends on one, fails.
    layer = make_layer(name)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    context, x_ND = moved(Batch(name, layer, LENGTHS), mode.from_tensor)
    with mode:
        route(name, layer, context, x_ND)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            x_ND.nonzero()


@pytest.mark.parametrize(
    "name", ["top_k", "adaptive", "expert_choice", "family", "language_generations", "group", "forced", "oracle"]
)
def test_routers_compile_as_one_graph(name: str) -> None:
    layer = make_layer(name).train(name == "forced")
    batch = Batch(name, layer, LENGTHS)
    context = replace(batch.context(), generator=None)
    assert context.rows.utterance_of_row.shape == (sum(LENGTHS),)  # worked out outside the graph, as all packing is
    x_ND = context.rows.pack(batch.x_BTD)

    def run(x_ND: Tensor) -> tuple[Tensor, Tensor]:
        plan = layer.router(x_ND, context)
        return plan.expert_ids, plan.gates

    torch.compiler.reset()
    for found, expected in zip(torch.compile(run, fullgraph=True, backend="eager")(x_ND), run(x_ND), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROUTERS)
def test_nothing_waits_for_the_gpu(name: str) -> None:
    layer = make_layer(name).cuda()
    context, x_ND = moved(Batch(name, layer, LENGTHS), Tensor.cuda)
    route(name, layer, context, x_ND)  # the first call may wait while libraries start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        route(name, layer, context, x_ND)
    finally:
        torch.cuda.set_sync_debug_mode("default")
