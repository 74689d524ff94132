import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mole_asr.moe import (
    CentroidRouter,
    ForcedLabelRouter,
    LanguageRouter,
    MLPRouter,
    MoELayer,
    OracleRouter,
    PackedRows,
    PseudoLabelRouter,
    RoutingContext,
    TopKRouter,
)
from mole_asr.moe.convert import contiguous_groups, slice_dense, upcycle_dense
from mole_asr.moe.experts import feed_forward
from mole_asr.moe.pseudo_labels import activation_mass
from mole_asr.moe.routers import expert_centroids
from tests.moe.routed import dense_ffn

ACTIVATIONS = ["relu", "silu", "gelu", "swiglu", "reglu", "geglu"]
LENGTHS = torch.tensor([5, 0, 7])


def run(layer: MoELayer, x_ND: Tensor, backend: str = "auto") -> Tensor:
    layer.backend = backend
    return layer(x_ND[None], torch.tensor([len(x_ND)]))[0][0]


def slice_routers(layer: MoELayer, k: int) -> list[torch.nn.Module]:
    centroids_ED = expert_centroids(layer.experts)
    return [
        CentroidRouter(centroids_ED, k),
        MLPRouter(centroids_ED, k),
        OracleRouter(layer.experts, k),
        PseudoLabelRouter(layer.experts.d_model, layer.experts.num_experts, k),
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_slices_are_the_dense_ffn(activation: str, bias: bool, backend: str) -> None:
    dense = dense_ffn(activation, bias=bias)
    layer = slice_dense(dense, torch.randperm(24).view(4, 6), activation)
    x_ND = torch.randn(30, 6, dtype=torch.float64)
    for router in slice_routers(layer, 4):
        layer.router = router
        torch.testing.assert_close(run(layer, x_ND, backend), feed_forward(x_ND, dense, activation), atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 5), st.data())
def test_any_grouping_gives_the_sum_over_the_chosen_neurons(
    seed: int, num_experts: int, width: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    activation, k = data.draw(st.sampled_from(ACTIVATIONS)), data.draw(st.integers(1, num_experts))
    dense = dense_ffn(activation, d_ff=num_experts * width)
    groups_EF = torch.randperm(num_experts * width).view(num_experts, width)
    layer = slice_dense(dense, groups_EF, activation)
    layer.router = OracleRouter(layer.experts, k)
    x_ND = torch.randn(9, 6, dtype=torch.float64)
    chosen_NK = layer.router(x_ND).expert_ids.long()
    kept_NF = torch.zeros(9, num_experts * width, dtype=torch.float64)
    kept_NF.scatter_(1, groups_EF[chosen_NK].flatten(1), 1.0)
    masked = dense._replace(b2_D=None)
    expected_ND = torch.stack(
        [
            feed_forward(x_D, masked._replace(w2_DF=dense.w2_DF * kept_F), activation)
            for x_D, kept_F in zip(x_ND, kept_NF, strict=True)
        ]
    )
    torch.testing.assert_close(run(layer, x_ND), expected_ND + dense.b2_D)


def test_the_output_bias_is_added_once_to_every_valid_row_and_trains() -> None:
    dense = dense_ffn("relu")
    layer = slice_dense(dense, contiguous_groups(24, 4), "relu")
    layer.router = CentroidRouter(expert_centroids(layer.experts), 3)
    assert layer.experts.b2_ED is None
    x_BTD = torch.randn(3, 7, 6, dtype=torch.float64)
    y_BTD, _ = layer(x_BTD, LENGTHS)
    padding = torch.arange(7) >= LENGTHS[:, None]
    assert torch.count_nonzero(y_BTD[padding]) == 0
    y_BTD.sum().backward()
    torch.testing.assert_close(layer.bias_D.grad, torch.full((6,), 12.0, dtype=torch.float64))
    with torch.no_grad():
        layer.bias_D.zero_()
    torch.testing.assert_close(y_BTD[~padding] - layer(x_BTD, LENGTHS)[0][~padding], dense.b2_D.expand(12, 6))


def test_slices_keep_every_value_and_can_be_saved_and_loaded() -> None:
    dense = dense_ffn("swiglu")
    layer = slice_dense(dense, contiguous_groups(24, 4), "swiglu")
    torch.testing.assert_close(layer.experts.w1_EFD[1, :6], dense.w1_FD[6:12])
    torch.testing.assert_close(layer.experts.w1_EFD[1, 6:], dense.w1_FD[30:36])
    torch.testing.assert_close(layer.experts.w2_EDF[1], dense.w2_DF[:, 6:12])
    again = MoELayer(6, 6, 4, activation="swiglu", slices=True).double()
    again.load_state_dict(layer.state_dict())
    again.router = layer.router = OracleRouter(layer.experts, 2)
    x_ND = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(run(again, x_ND), run(layer, x_ND))
    with torch.no_grad():
        layer.experts.w1_EFD.zero_()
    assert dense.w1_FD.abs().sum() > 0  # a copy


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled"])
def test_a_shared_expert_beside_slices_has_no_output_bias_either(backend: str) -> None:
    layer = MoELayer(6, 6, 4, TopKRouter(6, 4, 2, shared_expert=True), shared_expert=True, slices=True).double()
    assert layer.experts.shared_b2_D is None and layer.experts.shared_b1_F is not None
    torch.nn.init.normal_(layer.bias_D)
    x_ND = torch.randn(9, 6, dtype=torch.float64)
    plan, weights = layer.router(x_ND), layer.experts.unbind()
    for n, y_D in enumerate(run(layer, x_ND, backend)):
        outputs = [feed_forward(x_ND[n], weights[expert], "silu") for expert in plan.expert_ids[n]]
        expected_D = sum(gate * output for gate, output in zip(plan.gates[n], outputs, strict=True)) + layer.bias_D
        torch.testing.assert_close(y_D, expected_D + feed_forward(x_ND[n], layer.experts.shared_weights(), "silu"))


def test_the_oracle_loses_least() -> None:
    dense = dense_ffn("relu", d_ff=48)
    layer = slice_dense(dense, torch.randperm(48).view(8, 6), "relu")
    x_ND = torch.randn(200, 6, dtype=torch.float64)
    mass_NE = activation_mass(x_ND, layer.experts)
    torch.testing.assert_close(mass_NE.sum(-1), (x_ND @ dense.w1_FD.t() + dense.b1_F).relu().sum(-1))
    expected_ND = feed_forward(x_ND, dense, "relu")
    errors = []
    for router in (*slice_routers(layer, 4)[::2], TopKRouter(6, 8, 4).double()):
        layer.router = router
        errors.append(float((run(layer, x_ND).detach() - expected_ND).norm() / expected_ND.norm()))
    centroid, oracle, random = errors
    assert oracle < centroid < random


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_upcycling_with_renormalised_weights_preserves_the_function(activation: str, backend: str) -> None:
    dense = dense_ffn(activation)
    x_ND = torch.randn(30, 6, dtype=torch.float64)
    expected_ND = feed_forward(x_ND, dense, activation)
    for router in (TopKRouter(6, 5, 2), TopKRouter(6, 5, 5), ForcedLabelRouter(6, 5)):
        layer = upcycle_dense(dense, 5, activation, router)
        torch.testing.assert_close(run(layer, x_ND, backend), expected_ND, atol=1e-6, rtol=0)
    raw = upcycle_dense(dense._replace(b1_F=None, b2_D=None), 5, activation, TopKRouter(6, 5, 2, renormalize=False))
    share = run(raw, x_ND, backend).norm() / feed_forward(x_ND, dense._replace(b1_F=None, b2_D=None), activation).norm()
    assert share < 0.9


@pytest.mark.parametrize("backend", ["reference", "cpu_tiled", "segment"])
def test_upcycling_into_language_experts_preserves_the_function(backend: str) -> None:
    dense = dense_ffn("silu", bias=False)
    layer = upcycle_dense(dense, 3, "silu", LanguageRouter(3), shared_expert=True, backend=backend)
    x_BTD, rows = torch.randn(3, 7, 6, dtype=torch.float64), PackedRows.from_lengths(LENGTHS, 7)
    y_BTD, _ = layer(x_BTD, rows=rows, context=RoutingContext(rows, torch.randn(3, 3, dtype=torch.float64)))
    torch.testing.assert_close(rows.pack(y_BTD), feed_forward(rows.pack(x_BTD), dense, "silu"), atol=1e-6, rtol=0)


def test_one_bias_may_be_missing() -> None:
    whole = dense_ffn("gelu")
    x_ND = torch.randn(9, 6, dtype=torch.float64)
    for dense in (whole._replace(b1_F=None), whole._replace(b2_D=None)):
        expected_ND = feed_forward(x_ND, dense, "gelu")
        sliced = slice_dense(dense, contiguous_groups(24, 3), "gelu", PseudoLabelRouter(6, 3, 3))
        for layer in (sliced, upcycle_dense(dense, 3, "gelu", TopKRouter(6, 3, 2))):
            torch.testing.assert_close(run(layer, x_ND), expected_ND, atol=1e-6, rtol=0)


def test_what_cannot_be_converted_is_named() -> None:
    dense = dense_ffn("relu")
    with pytest.raises(ValueError, match="24 neurons cannot be cut into 5"):
        contiguous_groups(24, 5)
    for bad_groups in (torch.zeros(4, 6, dtype=torch.long), contiguous_groups(12, 4), contiguous_groups(24, 4) + 1):
        with pytest.raises(ValueError, match="each of the 24 neurons once"):
            slice_dense(dense, bad_groups, "relu")
    with pytest.raises(ValueError, match=r"w1 must be \(48, 6\) for 'swiglu'"):
        slice_dense(dense, contiguous_groups(24, 4), "swiglu")
    with pytest.raises(ValueError, match=r"w1_EFD must be \(3, 48, 6\), not \(3, 24, 6\)"):
        upcycle_dense(dense, 3, "swiglu")
