"""Softmax and products part by part: the right values and gradients, and old bits that stay when a part sleeps."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mole_asr.moe.parts import ASLEEP, PartedInput, PartedLinear, log_softmax
from mole_asr.moe.routers import Families, LanguageRouter, RoutingContext
from mole_asr.moe.rows import PackedRows

PARTS = st.lists(st.integers(1, 20), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(parts=PARTS, seed=st.integers(0, 99))
def test_a_softmax_is_over_the_generations_that_count(parts: list[int], seed: int) -> None:
    """Against a loop over rows."""
    generator = torch.Generator().manual_seed(seed)
    logits_BTC = torch.randn(4, 3, sum(parts), generator=generator, dtype=torch.float64)
    newest_B = torch.randint(len(parts), (4,), generator=generator)
    for newest in (newest_B, newest_B[:, None].expand(4, 3)):
        logs_BTC = log_softmax(logits_BTC, parts, newest)
        for row in range(4):
            end = sum(parts[: int(newest_B[row]) + 1])
            torch.testing.assert_close(logs_BTC[row, :, :end], logits_BTC[row, :, :end].log_softmax(-1))
            assert (logs_BTC[row, :, end:] == ASLEEP).all()
    torch.testing.assert_close(log_softmax(logits_BTC, parts), logits_BTC.log_softmax(-1))


@settings(max_examples=40, deadline=None)
@given(parts=PARTS, new=st.integers(0, 9), rows=st.integers(1, 40), seed=st.integers(0, 99))
def test_later_classes_change_no_bit(parts: list[int], new: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, sum(parts), generator=generator)
    wider = torch.cat([logits, 9 * torch.randn(rows, new, generator=generator)], -1)
    newest = torch.randint(len(parts), (rows,), generator=generator)
    found = log_softmax(wider, [*parts, new], newest)
    assert torch.equal(found[:, : sum(parts)], log_softmax(logits, parts, newest))


@pytest.mark.parametrize(("old", "new"), [(5, 1), (7, 1), (15, 1), (13, 4), (50, 3)])
@pytest.mark.parametrize("rows", [1, 4, 300])
def test_wider_layers_compute_the_old_part_with_the_same_bits(old: int, new: int, rows: int) -> None:
    torch.manual_seed(0)
    narrow, wide = PartedLinear(96, old), PartedLinear(96, old + new)
    narrow_in, wide_in = PartedInput(old, 24), PartedInput(old + new, 24)
    wide.parts = wide_in.parts = (old, new)
    with torch.no_grad():
        wide.weight[:old], wide.bias[:old] = narrow.weight, narrow.bias
        wide_in.weight[:, :old], wide_in.bias[:] = narrow_in.weight, narrow_in.bias
    x = torch.randn(rows, 96)
    y = wide(x)
    assert torch.equal(y[:, :old], narrow(x))
    torch.testing.assert_close(y, nn.functional.linear(x, wide.weight, wide.bias))
    p = torch.cat([torch.rand(rows, old), torch.zeros(rows, new)], -1)
    assert torch.equal(wide_in(p), narrow_in(p[:, :old]))
    q = torch.rand(rows, old + new)
    torch.testing.assert_close(wide_in(q), nn.functional.linear(q, wide_in.weight, wide_in.bias))


def context(logits_BN: torch.Tensor, languages: list[int] | None = None) -> RoutingContext:
    labels_B = None if languages is None else torch.tensor(languages)
    rows = PackedRows.from_lengths(torch.full((len(logits_BN),), 2), 2)
    return RoutingContext(rows, logits_BN, labels_B)


@pytest.mark.parametrize("families", [None, [0, 1, 0, 2]])
@pytest.mark.parametrize("new_expert", [None, 1])
@pytest.mark.parametrize("reliability", ["max_posterior", "entropy"])
def test_later_languages_change_no_plan_of_the_old(
    families: list[int] | None, new_expert: int | None, reliability: Literal["max_posterior", "entropy"]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BN = 3 * torch.randn(80, 6, generator=generator)
    experts = families or [0, 1, 2, 3]
    grown = [*experts, *((max(experts) + 1, max(experts) + 2) if new_expert is None else (new_expert,) * 2)]
    old = LanguageRouter(4, reliability, families=families).eval()
    new = LanguageRouter(6, reliability, families=grown, parts=(4, 1, 1)).eval()
    heard_B = logits_BN.argmax(1)
    is_old_B = heard_B < 4
    assert 20 < is_old_B.sum() < 75
    for labels in (None, [n % 4 for n in range(80)]):
        before, after = old(None, context(logits_BN[:, :4], labels)), new(None, context(logits_BN, labels))
        same_B = is_old_B if labels is None else torch.ones(80, dtype=torch.bool)
        assert torch.equal(before.expert_ids[same_B], after.expert_ids[same_B])
        assert torch.equal(before.gates[same_B], after.gates[same_B])
        assert before.shared_gates is not None and after.shared_gates is not None
        assert torch.equal(before.shared_gates[same_B], after.shared_gates[same_B])
    if new_expert is None and families is None:
        assert (new(None, context(logits_BN)).expert_ids[heard_B == 5] == grown[5]).all()
    asked = new(None, context(logits_BN, [4] * 80))
    assert asked.num_experts == max(grown) + 1 and (asked.expert_ids == grown[4]).all()
    if reliability == "max_posterior" and new_expert is None and families is None:
        torch.testing.assert_close(asked.gates[:, 0], logits_BN[:, :5].softmax(1)[:, 4])
    # In training all compete.
    p_BE = new.train()(None, context(logits_BN, [0] * 80)).aux["probabilities"]
    if new_expert is None and families is None:
        torch.testing.assert_close(p_BE, logits_BN.softmax(1))


@pytest.mark.parametrize(("families", "kept", "left"), [(None, [1, 3], [1, 3]), ([0, 1, 0, 2], [2, 3], [0, 2])])
@pytest.mark.parametrize("parts", [None, (2, 2)])
def test_kept_languages_are_routed_with_the_same_reliability(
    families: list[int] | None, kept: list[int], left: list[int], parts: tuple[int, int] | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BN = 3 * torch.randn(200, 4, generator=generator)
    whole = LanguageRouter(4, families=families, parts=parts).eval()
    part = LanguageRouter(4, families=families, parts=parts, kept=kept).eval()
    before, after = whole(None, context(logits_BN)), part(None, context(logits_BN))
    assert part.num_experts == after.num_experts == len(left)
    is_left_B = torch.isin(before.expert_ids[:, 0], torch.tensor(left))
    if parts is not None:  # a generation is that of the language, whoever else its expert serves
        is_left_B &= torch.isin(logits_BN.argmax(1), torch.tensor(kept))
    assert 0 < is_left_B.sum() < 200
    assert torch.equal(torch.tensor(left)[after.expert_ids[:, 0].long()][is_left_B], before.expert_ids[is_left_B, 0])
    assert torch.equal(after.gates[is_left_B], before.gates[is_left_B])
    # Told the language, by its place among the kept ones.
    labels = [n % 2 for n in range(200)]
    before = whole(None, context(logits_BN, [kept[label] for label in labels]))
    after = part(None, context(logits_BN, labels))
    assert torch.equal(torch.tensor(left)[after.expert_ids[:, 0].long()], before.expert_ids[:, 0])
    assert torch.equal(after.gates, before.gates)


def test_logits_of_the_first_languages_are_of_the_first_families() -> None:
    families = Families([0, 1, 0, 2, 1])
    logits_UL = torch.randn(6, 5)
    first = Families([0, 1, 0])
    assert torch.equal(families.logits(logits_UL[:, :3]), first.logits(logits_UL[:, :3]))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 3"):
        LanguageRouter(3, parts=(2, 2))
    with pytest.raises(ValueError, match="in which their languages came"):
        LanguageRouter(3, families=[1, 2, 0], parts=(2, 1))
