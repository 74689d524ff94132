"""What holds for every router, through a whole layer, whatever backend computes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.moe.experts import feed_forward
from mole_asr.moe.statistics import loads_by_language, routing_statistics
from tests.moe.routed import (
    FRAME_LOGITS,
    LENGTHS,
    REACHES,
    ROUTERS,
    Batch,
    assert_same,
    backends,
    losses_of,
    make_layer,
)


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
