"""The transformer: what it sees, what it remembers, and how its experts are chosen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from mole_asr.errors import MoleError
from mole_asr.moe.layer import MoELayer
from mole_asr.text.model import KeyValueCache, NetworkConfig, TextModel, attend, rotary_angles, rotate
from mole_asr.text.policies import ExpertsConfig

from .conftest import LANGUAGES, POLICIES

Make = Callable[..., TextModel]


def slow_forward(model: TextModel, ids: list[int]) -> torch.Tensor:
    """The logits of one sequence of a dense model, one token and one head at a time, from the formulas."""
    H, C = model.config.num_heads, model.config.d_model // model.config.num_heads
    turns = [model.config.rotary_base ** (-2 * i / C) for i in range(C // 2)]
    weights = dict(model.named_parameters())

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if model.config.norm == "layer":
            return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weights[name]
        return x / (x.square().mean() + 1e-6).sqrt() * weights[name]

    def turned(x_C: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.complex(x_C[: C // 2], x_C[C // 2 :])
        pairs = pairs * torch.polar(torch.ones(C // 2).double(), position * torch.tensor(turns).double())
        return torch.cat([pairs.real, pairs.imag])

    stream = [weights["embedding.weight"][token] for token in ids]
    for layer in range(model.config.num_layers):
        name = f"blocks.{layer}."
        heads = [
            (weights[name + "attention.query_key_value.weight"] @ norm(x, name + "attention_norm.weight")).view(3, H, C)
            for x in stream
        ]
        for t in reversed(range(len(stream))):
            mixed = []
            for h in range(H):
                visible = range(t + 1) if model.config.causal else range(len(stream))
                scores = [turned(heads[t][0, h], t) @ turned(heads[s][1, h], s) / C**0.5 for s in visible]
                shares = torch.stack(scores).softmax(0)
                mixed.append(sum(share * heads[s][2, h] for share, s in zip(shares, visible, strict=True)))
            stream[t] = stream[t] + weights[name + "attention.output.weight"] @ torch.cat(mixed)
        for t, x in enumerate(stream):
            z = weights[name + "feed_forward.up.weight"] @ norm(x, name + "feed_forward_norm.weight")
            if model.config.activation == "swiglu":
                gate, value = z.chunk(2)
                z = functional.silu(gate) * value
            else:
                z = getattr(functional, model.config.activation)(z)
            stream[t] = x + weights[name + "feed_forward.down.weight"] @ z
    return torch.stack([weights["embedding.weight"] @ norm(x, "norm.weight") for x in stream])


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "swiglu"},
        {"activation": "relu", "norm": "layer"},
        {"activation": "gelu", "causal": False},
        {"activation": "silu", "norm": "layer", "causal": False, "rotary_base": 50.0},
    ],
    ids=str,
)
def test_the_model_is_what_the_formulas_say(make_model: Make, changes: dict[str, Any], ids_BT: torch.Tensor) -> None:
    model = make_model(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms of ones would compare nothing
        found = model(ids_BT).logits_BTV
        for row, ids in enumerate(ids_BT.tolist()):
            torch.testing.assert_close(found[row], slow_forward(model, ids), rtol=1e-6, atol=1e-6)


def test_rotary_positions_turn_and_see_only_distances() -> None:
    torch.manual_seed(0)
    query_C, key_C = torch.randn(2, 8).double()
    angles = rotary_angles(torch.arange(40), 8, 100.0).double()
    both = torch.cat([angles, angles], dim=-1)

    def at(x_C: torch.Tensor, position: int) -> torch.Tensor:
        return rotate(x_C[None], both[position : position + 1].cos(), both[position : position + 1].sin())[0]

    assert torch.equal(at(query_C, 0), query_C)
    assert at(query_C, 7).norm().item() == pytest.approx(query_C.norm().item())
    near, far = at(query_C, 5) @ at(key_C, 2), at(query_C, 35) @ at(key_C, 32)
    assert near.item() == pytest.approx(far.item(), abs=1e-5)
    assert near.item() != pytest.approx((at(query_C, 5) @ at(key_C, 4)).item(), abs=1e-3)


@pytest.mark.parametrize("name", POLICIES)
def test_decoding_with_a_cache_is_the_full_computation(make_model: Make, name: str, ids_BT: torch.Tensor) -> None:
    model = make_model(POLICIES[name])
    whole = model(ids_BT).logits_BTV
    for cuts in ([4, 1, 1, 3, 2], [1] * 11, [11]):
        cache, pieces = KeyValueCache(), []
        for piece in ids_BT.split(cuts, dim=1):
            pieces.append(model(piece, cache=cache).logits_BTV)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-7, atol=1e-9)
        assert len(cache) == 11


def test_a_cache_goes_on_from_chosen_rows(make_model: Make, ids_BT: torch.Tensor) -> None:
    model, cache = make_model(), KeyValueCache()
    model(ids_BT[:, :6], cache=cache)
    order = torch.tensor([2, 2, 0])
    mixed = torch.cat([ids_BT[order, :6], ids_BT[:, 6:]], dim=1)
    found = model(ids_BT[:, 6:], cache=cache.select(order)).logits_BTV
    torch.testing.assert_close(found, model(mixed).logits_BTV[:, 6:], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", POLICIES)
def test_a_decoder_sees_nothing_that_comes_later(make_model: Make, name: str, ids_BT: torch.Tensor) -> None:
    model, changed = make_model(POLICIES[name]), ids_BT.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 30
    before, after = model(ids_BT).logits_BTV, model(changed).logits_BTV
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-9, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6


def test_an_encoder_sees_what_comes_later(make_model: Make, ids_BT: torch.Tensor) -> None:
    model, changed = make_model(causal=False), ids_BT.clone()
    changed[:, -1] = (changed[:, -1] + 5) % 30
    assert (model(ids_BT).logits_BTV - model(changed).logits_BTV)[:, 0].abs().max() > 1e-9


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", POLICIES)
def test_padding_touches_neither_logits_nor_plans(
    make_model: Make, name: str, causal: bool, ids_BT: torch.Tensor
) -> None:
    model = make_model(POLICIES[name], causal=causal)
    lengths = torch.tensor([11, 4, 7])
    together = model(ids_BT, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(ids_BT[row : row + 1, :length])
        torch.testing.assert_close(together.logits_BTV[row, :length], alone.logits_BTV[0], rtol=1e-7, atol=1e-9)
        start = int(lengths[:row].sum())
        for layer, plan in together.plans.items():
            assert torch.equal(plan.expert_ids[start : start + length], alone.plans[layer].expert_ids)
            assert plan.num_units == lengths.sum()


@pytest.mark.parametrize("name", ["post-moe", "families"])
def test_the_label_is_forced_in_training_only(make_model: Make, name: str, ids_BT: torch.Tensor) -> None:
    model = make_model(POLICIES[name])
    languages = torch.tensor([0, 2, 3])
    experts = torch.tensor(POLICIES[name].experts_of(LANGUAGES))[languages].repeat_interleave(11)
    plain, told = model(ids_BT), model(ids_BT, languages_B=languages)
    assert torch.equal(plain.logits_BTV, told.logits_BTV)
    free = [(plan.expert_ids == experts[:, None]).any(-1) for plan in told.plans.values()]
    assert not torch.stack(free).all(), "by chance all tokens chose their label's expert: nothing is tested"
    model.train()
    for plan in model(ids_BT, languages_B=languages).plans.values():
        assert (plan.expert_ids == experts[:, None]).any(-1).all()
    for layer, plan in model(ids_BT).plans.items():
        assert torch.equal(plan.expert_ids, plain.plans[layer].expert_ids)


def test_experts_stand_in_the_layers_that_the_config_names(make_model: Make) -> None:
    def layers(config: ExpertsConfig) -> list[int]:
        blocks = make_model(config).blocks
        return [place for place, block in enumerate(blocks) if isinstance(block.feed_forward, MoELayer)]

    assert [layers(POLICIES[name]) for name in POLICIES] == [[], *[[0, 1, 2]] * 4, [1, 2], [1], *[[0, 1, 2]] * 2]
    assert layers(ExpertsConfig("top_k", layers=[2, 0])) == [0, 2]
    branches = ExpertsConfig("forced", expert_of="branch").experts_of(["ru", "lt", "en", "de", "hi", "fa"])
    assert branches == [0, 0, 1, 1, 2, 2]
    families = make_model(POLICIES["families"])
    assert families.blocks[1].feed_forward.experts.num_experts == 3  # de and en share one
    assert families.policies[1].expert_of == {"de": "gem", "en": "gem", "fr": "roa", "ru": "sla"}


@pytest.mark.parametrize(
    ("kind", "values", "parts"),
    [
        (ExpertsConfig, {"policy": "best"}, ["policy", "best", "adaptive"]),
        (ExpertsConfig, {"layers": "last"}, ["layers", "last"]),
        (ExpertsConfig, {"policy": "top_k", "top_k": 9}, ["top_k: 9", "1..8"]),
        (ExpertsConfig, {"policy": "noisy_top_k", "top_k": 1}, ["top_k: 1", "2 or more"]),
        (ExpertsConfig, {"policy": "expert_choice", "renormalize": True}, ["renormalize", "expert_choice"]),
        (ExpertsConfig, {"threshold": 2.0}, ["threshold: 2"]),
        (ExpertsConfig, {"expert_of": "script"}, ["expert_of", "script"]),
        (NetworkConfig, {"d_model": 100, "num_heads": 3}, ["d_model: 100", "num_heads 3"]),
        (NetworkConfig, {"num_layers": 0}, ["num_layers: 0"]),
        (NetworkConfig, {"activation": "tanh"}, ["activation", "tanh"]),
    ],
)
def test_a_wrong_value_is_named(kind: Any, values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(MoleError) as caught:
        kind(**values)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (ExpertsConfig("top_k", layers=[3]), "layers: \\[3\\] do not exist"),
        (ExpertsConfig("top_k", layers="last 4"), "layers: last 4 do not exist"),
        (ExpertsConfig("forced", top_k=5), "top_k: 5 must be 2..4"),
    ],
)
def test_experts_that_do_not_fit_the_model_are_named(make_model: Make, config: ExpertsConfig, part: str) -> None:
    with pytest.raises(MoleError, match=part):
        make_model(config)


@pytest.mark.parametrize("kind", ["causal", "mask", "all"])
def test_attention_written_out_is_the_fused_one(kind: str) -> None:
    """What a CPU trains with in bfloat16, and its gradients, against the kernel in float32."""
    torch.manual_seed(0)
    exact = [torch.randn(3, 2, 7, 8).bfloat16().float().requires_grad_() for _ in range(3)]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    mask = (torch.arange(7) < torch.tensor([7, 3, 5])[:, None])[:, None, None, :] if kind == "mask" else None
    found, expected = (attend(*each, mask, is_causal=kind == "causal") for each in (rounded, exact))
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(rounded, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=0.1, atol=0.1)
