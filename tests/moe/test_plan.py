import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_asr.moe import PackedRows, RoutingPlan


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_a_segment_plan_spelled_out_a_row() -> None:
    gates = torch.tensor([[0.5], [0.25], [0.75]], requires_grad=True)
    plan = RoutingPlan(ids([2], [0], [3]), gates, 3, "segment", torch.tensor([0, 2, 2, 5]), 1 - gates[:, 0])
    token = plan.to_token_layout(5)
    assert token.layout == "token" and token.segments is None
    assert token.expert_ids[:, 0].tolist() == [2, 2, 3, 3, 3]
    assert token.gates[:, 0].tolist() == [0.5, 0.5, 0.75, 0.75, 0.75]
    assert token.shared_gates.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25]
    assert torch.autograd.grad(token.gates.sum(), gates)[0].tolist() == [[2.0], [0.0], [3.0]]
    assert token.to_token_layout(5) is token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids": torch.zeros(2, 1, dtype=torch.int64)}, "expert_ids must be int32"),
        ({"expert_ids": torch.zeros(2, dtype=torch.int32)}, "two dimensions"),
        ({"gates": torch.ones(2, 2)}, r"gates must be float \(2, 1\)"),
        ({"gates": torch.ones(2, 1, dtype=torch.int32)}, "gates must be float"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"layout": "expert"}, "layout must be"),
        ({"layout": "segment"}, "segments must be given"),
        ({"segments": torch.tensor([0, 1, 2])}, "segments must be given"),
        ({"layout": "segment", "segments": torch.tensor([0, 2])}, "must hold 3 offsets"),
        ({"shared_gates": torch.ones(2, 1)}, "shared_gates must hold 2 weights"),
    ],
)
def test_bad_plans_are_refused(changes: dict, message: str) -> None:
    good = {"expert_ids": ids([0], [1]), "gates": torch.ones(2, 1), "num_experts": 3}
    RoutingPlan(**good)
    with pytest.raises(ValueError, match=message):
        RoutingPlan(**{**good, **changes})


def test_values_are_checked_on_request() -> None:
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            RoutingPlan(ids([0], [bad]), torch.ones(2, 1), 3).check_ids()
    with pytest.raises(ValueError, match="rise from 0"):
        RoutingPlan(ids([0], [1]), torch.ones(2, 1), 3, "segment", torch.tensor([0, 3, 2])).check_ids()
    RoutingPlan(ids([0], [3]), torch.ones(2, 1), 3).check_ids()
    with pytest.raises(ValueError, match="has no segments"):
        _ = RoutingPlan(ids([0]), torch.ones(1, 1), 3).bounds


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=5), st.integers(0, 7))
def test_packing_and_unpacking(lengths: list[int], num_frames: int) -> None:
    lengths = [min(length, num_frames) for length in lengths]
    rows = PackedRows.from_lengths(torch.tensor(lengths, dtype=torch.long), num_frames)
    x_BTD = torch.arange(1.0, 1 + len(lengths) * num_frames * 2).view(len(lengths), num_frames, 2)
    packed_ND = rows.pack(x_BTD)
    assert rows.num_rows == sum(lengths) == len(packed_ND)
    assert rows.segments_B1.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert torch.equal(packed_ND, torch.cat([x[:n] for x, n in zip(x_BTD, lengths, strict=True)] or [packed_ND]))
    assert rows.utterance_of_row.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    valid = torch.arange(num_frames) < torch.tensor(lengths, dtype=torch.long)[:, None]
    assert torch.equal(rows.unpack(packed_ND), x_BTD * valid[:, :, None])


def test_nothing_is_copied_where_nothing_is_padded() -> None:
    rows = PackedRows.from_lengths(torch.tensor([4, 4]), 4)
    x_BTD = torch.randn(2, 4, 3)
    assert rows.pack(x_BTD).data_ptr() == x_BTD.data_ptr()
    assert rows.unpack(rows.pack(x_BTD)).data_ptr() == x_BTD.data_ptr()
    with pytest.raises(ValueError, match="vector of integers"):
        PackedRows.from_lengths(torch.tensor([1.0]), 4)
