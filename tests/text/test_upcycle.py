"""A dense model turned into experts: the same function where weights sum to one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mole_asr.errors import MoleError
from mole_asr.text.model import TextModel
from mole_asr.text.policies import ExpertsConfig
from mole_asr.text.upcycle import upcycle

from .conftest import LANGUAGES

Make = Callable[..., TextModel]


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize(
    "experts",
    [
        ExpertsConfig("forced", layers="last 2"),
        ExpertsConfig("forced", expert_of="family"),
        ExpertsConfig("top_k", num_experts=5, top_k=3),
        ExpertsConfig("adaptive", num_experts=5, renormalize=True),
        ExpertsConfig("noisy_top_k", num_experts=5),
    ],
    ids=["post-moe", "families", "top-3", "adaptive", "noisy"],
)
def test_the_upcycled_model_is_the_dense_one(
    make_model: Make, ids_BT: torch.Tensor, experts: ExpertsConfig, activation: str
) -> None:
    dense = make_model(activation=activation)
    model = upcycle(dense, [experts], LANGUAGES)
    assert list(model.policies) == experts.places(3)
    expected = dense(ids_BT).logits_BTV
    for mode in (model.eval(), model.train()):
        found = mode(ids_BT, languages_B=torch.tensor([0, 1, 3])).logits_BTV
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_raw_weights_start_weaker(make_model: Make, ids_BT: torch.Tensor) -> None:
    dense = make_model()
    model = upcycle(dense, [ExpertsConfig("forced", renormalize=False)], LANGUAGES).eval()
    assert (model(ids_BT).logits_BTV - dense(ids_BT).logits_BTV).abs().max() > 1e-3


def test_experts_go_on_as_they_are_and_activations_can_change(make_model: Make, ids_BT: torch.Tensor) -> None:
    experts = ExpertsConfig("top_k", num_experts=4)
    old = make_model(experts, activation="gelu")
    same = upcycle(old, [experts], LANGUAGES).eval()
    assert torch.equal(same(ids_BT).logits_BTV, old(ids_BT).logits_BTV)
    changed = upcycle(old, [experts], LANGUAGES, "relu").eval()
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), changed.parameters(), strict=True))
    assert (changed(ids_BT).logits_BTV - old(ids_BT).logits_BTV).abs().max() > 1e-4


def test_the_same_experts_can_be_gated_in_another_way(make_model: Make, ids_BT: torch.Tensor) -> None:
    top_2 = ExpertsConfig("top_k", num_experts=4, renormalize=False)
    top_1 = replace(top_2, top_k=1)
    old = make_model(top_2)
    logits = {
        experts: upcycle(old, [experts], LANGUAGES).eval()(ids_BT).logits_BTV
        for experts in (top_1, *(ExpertsConfig("adaptive", num_experts=4, threshold=T) for T in (0.0, 0.2, 1.0)))
    }
    one, none, some, all_of_them = logits.values()
    torch.testing.assert_close(none, one)
    torch.testing.assert_close(all_of_them, old(ids_BT).logits_BTV)
    assert (some - one).abs().max() > 1e-4 and (some - all_of_them).abs().max() > 1e-4


def test_what_does_not_fit_is_refused(make_model: Make) -> None:
    dense = make_model()
    with pytest.raises(MoleError, match=r"expert_d_ff: 8 is not the 24"):
        upcycle(dense, [ExpertsConfig("top_k", expert_d_ff=8)], LANGUAGES)
    with pytest.raises(MoleError, match=r"relu does not fit a model with swiglu"):
        upcycle(dense, [ExpertsConfig()], LANGUAGES, "relu")
    with pytest.raises(MoleError, match="has experts already"):
        upcycle(make_model(ExpertsConfig("top_k")), [ExpertsConfig("adaptive", num_experts=4)], LANGUAGES)
    with pytest.raises(MoleError, match="has experts already"):
        upcycle(make_model(ExpertsConfig("top_k")), [ExpertsConfig("noisy_top_k")], LANGUAGES)
    with pytest.raises(MoleError, match=r"shared_expert: .* double the output"):
        upcycle(dense, [ExpertsConfig("top_k", shared_expert=True)], LANGUAGES)
    one, other = (ExpertsConfig("top_k", layers=[layer], share_router=True) for layer in (0, 2))
    with pytest.raises(MoleError, match="layers 0 and 2 of that model have a router each"):
        upcycle(make_model(one, more=[other]), [replace(one, layers=[0, 2])], LANGUAGES)


def test_dense_layers_of_a_model_with_experts_get_experts_too(make_model: Make, ids_BT: torch.Tensor) -> None:
    first, others = ExpertsConfig("top_k", layers=[0], num_experts=4), ExpertsConfig("forced", layers="last 2")
    old = make_model(first)
    model = upcycle(old, [first, others], LANGUAGES).eval()
    assert list(model.policies) == [0, 1, 2]
    torch.testing.assert_close(model(ids_BT).logits_BTV, old(ids_BT).logits_BTV, rtol=1e-10, atol=1e-12)
