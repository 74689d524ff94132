"""Bits a byte, what routers did and what a token costs, each against a count by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.rows import PackedRows
from mole_asr.text.cost import token_cost
from mole_asr.text.figures import BitsMeter, RoutingMeter, major_and_minor, nats
from mole_asr.text.model import TextModel, TextOutput
from mole_asr.text.policies import ExpertsConfig
from mole_asr.text.vocabulary import load_vocabulary
from mole_asr.text.windows import pack_windows

from .conftest import POLICIES

Make = Callable[..., TextModel]
TEXTS = {"de": ["über", "ab"], "en": ["hello", "x", "yz"]}


@pytest.mark.parametrize("name", ["dense", "post-moe"])
def test_bits_per_byte_are_those_of_a_slow_count(make_model: Make, name: str) -> None:
    """Each byte by itself, from the tokens of its window before it; a separator is a byte too."""
    window = 6
    model = make_model(POLICIES[name], vocab_size=258)
    windows = pack_windows(TEXTS, list(TEXTS), load_vocabulary("bytes"), window, fill=False)
    meter = BitsMeter(2)
    for rows in ([0, 2], [1, 3]):
        batch = windows.batch(np.array(rows))
        output = model(batch.tokens_BS[:, :-1], batch.lengths_B)
        cost = nats(output.logits_BTV, batch.targets())
        meter.add(cost, batch.byte_shares_BS[:, 1:], batch.targets(), batch.languages_B)
    assert len(windows) == 4
    for language, texts in enumerate(TEXTS.values()):
        stream = [256] + [token for text in texts for token in [*text.encode(), 256]]
        bits = 0.0
        for place in range(1, len(stream)):
            start = (place - 1) // window * window
            shares = model(torch.tensor([stream[start:place]])).logits_BTV[0, -1].softmax(-1)
            bits -= math.log2(shares[stream[place]].item())
        assert meter.bits_per_byte()[language].item() == pytest.approx(bits / (len(stream) - 1), rel=1e-6)


def test_languages_that_are_unknown_count_nowhere() -> None:
    meter = BitsMeter(2)
    ones = torch.ones(2, 3)
    meter.add(ones, ones, torch.tensor([[1, 2, 3], [4, 5, -1]]), torch.tensor([-1, 1]))
    assert meter.sums_L2.tolist() == [[0, 0], [3, 2]]
    assert math.isnan(meter.bits_per_byte()[0])


def test_what_routers_did() -> None:
    lengths = torch.tensor([2, 3, 1])
    ids = torch.tensor([[0, 1], [0, 4], [2, 3], [2, 4], [3, 4], [1, 4]], dtype=torch.int32)  # 4: no expert
    plan = RoutingPlan(ids, torch.ones(6, 2), 4)
    rows = PackedRows.from_lengths(lengths, 3)
    meter = RoutingMeter({2: 4}, 2)
    meter.add(TextOutput(torch.zeros(3, 3, 1), rows, {2: plan}), torch.tensor([0, 1, -1]))
    found = meter.figures()[2]
    assert found.several_share == pytest.approx(2 / 5)
    assert found.experts_per_token == pytest.approx(7 / 5)
    loads = np.array([[2, 1, 0, 0], [0, 0, 2, 2]])

    def entropy(counts: np.ndarray) -> float:
        shares = counts[counts > 0] / counts.sum()
        return -(shares * np.log(shares)).sum() / math.log(4)

    assert found.load_entropy == pytest.approx(entropy(loads.sum(0)))
    assert found.language_entropy == pytest.approx((entropy(loads[0]) + entropy(loads[1])) / 2)
    assert found.purity == 1.0
    meter.add(
        TextOutput(
            torch.zeros(1, 3, 1),
            PackedRows.from_lengths(lengths[1:2], 3),
            {2: RoutingPlan(ids[:3], torch.ones(3, 2), 4)},
        ),
        torch.tensor([1]),
    )
    assert meter.figures()[2].purity == pytest.approx((2 + 1 + 3 + 3) / 12)
    assert RoutingMeter({0: 4}, 2).figures() == {}


def test_means_of_major_and_minor_languages() -> None:
    assert major_and_minor({"de": 1.0, "en": 2.0, "xx": 6.0}, ["de", "en"]) == {"all": 3.0, "major": 1.5, "minor": 6.0}
    assert major_and_minor({"xx": 6.0}, ["de"]) == {"all": 6.0, "minor": 6.0}


def test_a_token_of_one_expert_costs_as_much_as_a_dense_one(make_model: Make) -> None:
    """The meter of adaptive gating: FLOPs = those of top-2 x (1 - half the share of tokens with one expert)."""
    dense, experts = make_model(), make_model(ExpertsConfig("adaptive", layers=[1], num_experts=4))
    D, F, T = 16, 24, 11
    part, router = 2 * 3 * D * F, 2 * 4 * D
    dense_cost = token_cost(dense, T, {})
    assert dense_cost.feed_forward_flops == 3 * part
    assert dense_cost.flops == 3 * part + 3 * (8 * D * D + 4 * D * (T + 1) / 2) + 2 * D * 30
    assert dense_cost.total_parameters == dense_cost.active_parameters
    for share in (0.0, 0.25, 1.0):
        cost = token_cost(experts, T, {1: 2 - share})
        assert cost.feed_forward_flops == pytest.approx(2 * part + router + 2 * part * (1 - share / 2))
    shared = make_model(ExpertsConfig("noisy_top_k", layers=[0, 1, 2], num_experts=4, top_k=4, share_router=True))
    size, noise = sum(parameter.numel() for parameter in shared.parameters()), 4 * D  # its map is for training alone
    assert token_cost(shared, T, dict.fromkeys(range(3), 4.0)).active_parameters == size - noise
    one = token_cost(experts, T, {1: 1.0})
    assert one.active_parameters == dense_cost.active_parameters + 4 * D
    assert one.total_parameters == dense_cost.total_parameters + 4 * D + 3 * 3 * D * F
