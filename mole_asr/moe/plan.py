"""Which expert computes which row, with which weight: all that a router decides.

Shape letters: N rows, K experts a row, E experts, U segments (utterances) of consecutive rows.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["token", "segment"]


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """The decision of a router for the rows of one batch.

    In the layout "token" a unit is a row; in "segment" a unit is a run of consecutive rows, such as an utterance.

    Attributes:
        expert_ids: int32 [N, K] or [U, K]; the value `num_experts` means "no expert": such a slot is never computed.
        gates: float [N, K] or [U, K], the weight of each expert's output; differentiable; unused where no expert is.
        num_experts: E, without the shared expert.
        layout: "token" or "segment".
        segments: integers [U + 1], offsets of the segments' first rows and the number of rows; "segment" only.
        shared_gates: float [N] or [U], weight of the shared expert that sees every row; None leaves it out.
        aux: tensors for losses and statistics, by name; `routers/` says which router gives which.
    """

    expert_ids: Tensor
    gates: Tensor
    num_experts: int
    layout: Layout = "token"
    segments: Tensor | None = None
    shared_gates: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict, repr=False)
    # What backends work out from the integers of this plan, so that the layers that share a plan do it once.
    # No differentiable tensor belongs here: it would tie the graphs of the layers together.
    schedules: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check shapes and types; values are checked by `check_ids`, which waits for the device."""
        if self.expert_ids.dim() != 2 or self.expert_ids.dtype != torch.int32:
            raise ValueError(f"expert_ids must be int32 of two dimensions, not {_describe(self.expert_ids)}")
        if self.gates.shape != self.expert_ids.shape or not self.gates.is_floating_point():
            expected = tuple(self.expert_ids.shape)
            raise ValueError(f"gates must be float {expected} as expert_ids, not {_describe(self.gates)}")
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {self.num_experts}")
        if self.layout not in ("token", "segment"):
            raise ValueError(f"layout must be 'token' or 'segment', not {self.layout!r}")
        if (self.segments is not None) != (self.layout == "segment"):
            raise ValueError("segments must be given in the layout 'segment', and only there")
        if self.segments is not None and self.segments.shape != (self.num_units + 1,):
            raise ValueError(f"segments must hold {self.num_units + 1} offsets, not {_describe(self.segments)}")
        if self.shared_gates is not None and self.shared_gates.shape != (self.num_units,):
            raise ValueError(f"shared_gates must hold {self.num_units} weights, not {_describe(self.shared_gates)}")

    @property
    def num_units(self) -> int:
        """Rows in the layout "token", segments in the layout "segment"."""
        return self.expert_ids.shape[0]

    @property
    def top_k(self) -> int:
        """K, the slots for experts that a unit has."""
        return self.expert_ids.shape[1]

    @cached_property
    def bounds(self) -> list[int]:
        """The segments' row offsets as Python numbers; waits for the device once a plan."""
        if self.segments is None:
            raise ValueError("a plan in the layout 'token' has no segments")
        return self.segments.tolist()

    def check_ids(self) -> None:
        """Check the values of the ids and offsets; waits for the device.

        Raises:
            ValueError: an id is outside 0..num_experts, or the offsets do not rise from 0.
        """
        if self.expert_ids.numel():
            low, high = (int(value) for value in self.expert_ids.aminmax())
            if low < 0 or high > self.num_experts:
                raise ValueError(f"expert_ids must lie in 0..{self.num_experts}, found {low}..{high}")
        if self.segments is not None and (self.bounds[0] != 0 or self.bounds != sorted(self.bounds)):
            raise ValueError(f"segments must be offsets that rise from 0, not {self.bounds}")

    def unit_of_row(self, num_rows: int) -> Tensor:
        """The unit (int64 [num_rows]) that each row belongs to."""
        units = torch.arange(self.num_units, device=self.expert_ids.device)
        if self.segments is None:
            return units
        return units.repeat_interleave(self.segments.diff().to(units.device), output_size=num_rows)

    def to_token_layout(self, num_rows: int) -> "RoutingPlan":
        """The same decision, spelled out a row. `aux` stays as it is, a unit.

        Args:
            num_rows: N, the number of rows; it is known to the caller without waiting for the device.
        """
        if self.layout == "token":
            return self
        unit_N = self.unit_of_row(num_rows)
        return replace(
            self,
            expert_ids=self.expert_ids.index_select(0, unit_N),
            gates=self.gates.index_select(0, unit_N),
            shared_gates=None if self.shared_gates is None else self.shared_gates.index_select(0, unit_N),
            layout="token",
            segments=None,
        )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
