"""Softmax and products part by part: the right values and gradients, and old bits that stay when a part sleeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mole_asr.moe.parts import ASLEEP, PartedInput, PartedLinear, log_softmax, softmax
from mole_asr.moe.routers import Families, LanguageRouter, RoutingContext
from mole_asr.moe.rows import PackedRows

PARTS = st.lists(st.integers(1, 20), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(parts=PARTS, seed=st.integers(0, 99), scale=st.sampled_from([1.0, 30.0]))
def test_parts_give_the_softmax_of_the_whole(parts: list[int], seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(3, sum(parts), generator=generator, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    for ours, whole in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        actual, expected = ours(logits, parts), whole(logits, -1)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad((y * weights).sum(), logits)[0] for y in (actual, expected)]
        torch.testing.assert_close(*gradients)


@settings(max_examples=40, deadline=None)
@given(parts=PARTS, new=st.integers(1, 9), rows=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_sleeping_part_changes_no_bit(parts: list[int], new: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, sum(parts), generator=generator)
    wider = torch.cat([logits, torch.full((rows, new), ASLEEP)], -1)
    for ours in (softmax, log_softmax):
        assert torch.equal(ours(wider, [*parts, new])[:, : sum(parts)], ours(logits, parts))
    assert not softmax(wider, [*parts, new])[:, sum(parts) :].any()


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
    return RoutingContext(rows, logits_BN, labels_B, routing="true")


@pytest.mark.parametrize("families", [None, [0, 1, 0, 2]])
@pytest.mark.parametrize("new_expert", [None, 1])
def test_a_sleeping_language_changes_no_plan(families: list[int] | None, new_expert: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BN = 3 * torch.randn(50, 4, generator=generator)
    old = LanguageRouter(4, families=families)
    experts = families or [0, 1, 2, 3]
    grown = [*experts, max(experts) + 1 if new_expert is None else new_expert]
    new = LanguageRouter(5, families=grown, parts=(4, 1))
    wider_BN = torch.cat([logits_BN, torch.full((50, 1), ASLEEP)], 1)
    for labels in (None, [n % 4 for n in range(50)]):
        before, after = old(None, context(logits_BN, labels)), new(None, context(wider_BN, labels))
        assert torch.equal(before.expert_ids, after.expert_ids) and torch.equal(before.gates, after.gates)
        assert before.shared_gates is not None and after.shared_gates is not None
        assert torch.equal(before.shared_gates, after.shared_gates)
    asked = new(None, context(wider_BN, [4] * 50))
    assert asked.num_experts == max(grown) + 1 and (asked.expert_ids == grown[-1]).all()


@pytest.mark.parametrize(("families", "kept", "left"), [(None, [1, 3], [1, 3]), ([0, 1, 0, 2], [2, 3], [0, 2])])
def test_kept_languages_are_routed_with_the_same_reliability(
    families: list[int] | None, kept: list[int], left: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BN = 3 * torch.randn(200, 4, generator=generator)
    whole, part = LanguageRouter(4, families=families), LanguageRouter(4, families=families, kept=kept)
    before, after = whole(None, context(logits_BN)), part(None, context(logits_BN))
    assert part.num_experts == after.num_experts == len(left)
    is_left_B = torch.isin(before.expert_ids[:, 0], torch.tensor(left))
    assert 0 < is_left_B.sum() < 200
    assert torch.equal(torch.tensor(left)[after.expert_ids[:, 0].long()][is_left_B], before.expert_ids[is_left_B, 0])
    assert torch.equal(after.gates[is_left_B], before.gates[is_left_B])
    # Told the language, by its place among the kept ones.
    labels = [n % 2 for n in range(200)]
    before = whole(None, context(logits_BN, [kept[label] for label in labels]))
    after = part(None, context(logits_BN, labels))
    assert torch.equal(torch.tensor(left)[after.expert_ids[:, 0].long()], before.expert_ids[:, 0])
    assert torch.equal(after.gates, before.gates)


def test_family_logits_by_parts_have_the_values_and_gradients_of_the_whole() -> None:
    families = Families([0, 1, 0, 2, 1])
    logits_UL = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    weights_UE = torch.randn(6, 3, dtype=torch.float64)
    values = [families.logits(logits_UL, parts) for parts in (None, (2, 2, 1))]
    torch.testing.assert_close(*values)
    gradients = [torch.autograd.grad((value * weights_UE).sum(), logits_UL)[0] for value in values]
    assert gradients[1].isfinite().all()
    torch.testing.assert_close(*gradients)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 3"):
        LanguageRouter(3, parts=(2, 2))
    with pytest.raises(ValueError, match="in which they came"):
        LanguageRouter(3, families=[1, 2, 0], parts=(2, 1))
