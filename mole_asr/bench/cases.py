"""What `bench moe` measures: problems of the sizes that speech models have.

Shape letters: N rows, K experts a row, E experts, U utterances, D model width, F expert width.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from mole_asr.errors import MoleError
from mole_asr.moe.experts import GATED, Activation, Experts
from mole_asr.moe.plan import RoutingPlan

KINDS = ("token", "language", "slices")
SKEWS = ("even", "skewed")
ROWS_OF_AN_UTTERANCE = 1000
"""40 seconds at 40 ms a row; there are at least eight utterances."""


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        kind: "token", each row has its own experts; "language", each utterance has one expert and all rows the shared
            one; "slices", each row has a quarter of the slices that one dense layer was cut into (MoEfication).
        dtype: of rows, parameters and products.
        d_model: D.
        d_ff: F, the width of one expert.
        experts: E.
        top_k: K.
        rows: N.
        skew: "even", or "skewed", where expert e is as likely as 1 / (e + 1)^2.
        activation: of the experts.
        bias: whether the experts have biases.
    """

    kind: str
    dtype: str
    d_model: int
    d_ff: int
    experts: int
    top_k: int
    rows: int
    skew: str
    activation: Activation
    bias: bool

    @property
    def pairs(self) -> int:
        """Pairs of a row and an expert, the shared expert's too."""
        return self.rows * (2 if self.kind == "language" else self.top_k)

    @property
    def up(self) -> int:
        """Rows of the first matrix of an expert: its width, and that of its gate."""
        return self.d_ff * (2 if self.activation in GATED else 1)

    @property
    def flops(self) -> int:
        """Floating point operations of the forward products."""
        return 2 * self.pairs * self.d_model * (self.up + self.d_ff)

    def dense(self) -> "Case":
        """The dense layers that the case is compared with, as one expert that has all rows.

        "token": one dense layer of the expert's size on as many rows as there are pairs, so with equal FLOPs;
        "language": two dense layers on all rows; "slices": the whole dense layer.
        """
        if self.kind == "slices":
            return replace(self, experts=1, top_k=1, d_ff=self.d_ff * self.experts)
        return replace(self, experts=1, top_k=1, rows=self.pairs if self.kind == "token" else self.rows)

    def bytes_moved(self, backward: bool) -> int:
        """The memory traffic of two fused products and a sum, each tensor once: no implementation needs less."""
        weights = (self.experts + (self.kind == "language")) * self.d_model * (self.up + self.d_ff)
        rows, pairs = self.rows * self.d_model, self.pairs * self.d_model
        summed = pairs + (pairs + rows if self.pairs > self.rows else 0)
        moved = rows + 2 * self.pairs * self.d_ff + summed + weights
        if backward:
            # z is kept, dz read twice, gate * a once; x and twice dy are gathered; gradients of weights are written.
            moved += self.pairs * (5 * self.up + 2 * self.d_ff) + 3 * rows + summed + 2 * weights
        return moved * getattr(torch, self.dtype).itemsize

    def __str__(self) -> str:
        experts = f"{self.experts} experts {self.d_model} -> {self.d_ff} -> {self.d_model}"
        use = {"token": f"{self.top_k} a row", "language": "1 an utterance + shared", "slices": f"{self.top_k} a row"}
        return (
            f"{self.kind}: {experts}, {self.activation}, {use[self.kind]}, {self.rows} rows, {self.skew}, {self.dtype}"
        )


@dataclass(frozen=True, eq=False)
class Problem:
    """The tensors of a case.

    Attributes:
        x_ND: rows.
        plan: who computes what; its gates are leaves.
        experts: the parameters.
        dy_ND: gradient of the output.
    """

    x_ND: Tensor
    plan: RoutingPlan
    experts: Experts
    dy_ND: Tensor

    def fresh_plan(self) -> RoutingPlan:
        """The plan without what backends noted in it: each layer has to sort its rows itself."""
        return replace(self.plan)

    def inputs(self) -> list[Tensor]:
        """All that has a gradient."""
        candidates = [self.x_ND, self.plan.gates, self.plan.shared_gates, *self.experts.parameters()]
        return [tensor for tensor in candidates if tensor is not None and tensor.requires_grad]

    def in_double(self) -> "Problem":
        """The same numbers in float64, as a problem of its own."""
        plan = replace(
            self.plan,
            gates=_in_double(self.plan.gates),
            shared_gates=None if self.plan.shared_gates is None else _in_double(self.plan.shared_gates),
        )
        return Problem(_in_double(self.x_ND), plan, copy.deepcopy(self.experts).double(), self.dy_ND.double())


def select_cases(
    kinds: Sequence[str],
    dtypes: Sequence[str],
    d_models: Sequence[int],
    experts: Sequence[int],
    top_k: Sequence[int],
    rows: Sequence[int],
    skews: Sequence[str],
    activation: Activation,
    bias: bool,
    d_ff: int | None,
    neurons: Sequence[int],
) -> Iterator[Case]:
    """All cases of these sizes; what a kind has no use for is not multiplied, more slots than experts are left out.

    Raises:
        MoleError: a size below one, slices that do not divide their layer, or so wide that a quarter of them is none.
    """
    if min(*d_models, *experts, *top_k, *rows, *neurons, 1 if d_ff is None else d_ff) < 1:
        raise MoleError("sizes must be 1 or more")
    for kind, dtype, d_model, n in product(kinds, dtypes, d_models, rows):
        width = 4 * d_model if d_ff is None else d_ff
        if kind == "slices":
            for f in neurons:
                if width // f < 4:
                    raise MoleError(f"--neurons {f}: of {width} neurons a quarter must be a slice or more")
                if width % f:
                    raise MoleError(f"--neurons {f}: {width} neurons are no whole number of such slices")
                yield Case(kind, dtype, d_model, f, width // f, width // f // 4, n, "even", "relu", False)
            continue
        for e, k, skew in product(experts, top_k if kind == "token" else (1,), skews):
            if k <= e:
                yield Case(kind, dtype, d_model, width, e, k, n, skew, activation, bias)


def make_problem(case: Case, device: torch.device) -> Problem:
    """Random rows and parameters; experts drawn as the case says. The same case gives the same numbers."""
    generator = torch.Generator().manual_seed(0)
    length = min(ROWS_OF_AN_UTTERANCE, -(-case.rows // 8)) if case.kind == "language" else 1
    units = -(-case.rows // length)
    ids = _draw_ids(case, units, generator)
    gates = torch.rand(ids.shape, generator=generator).to(device).requires_grad_()
    if case.kind == "language":
        segments = torch.arange(units + 1).mul(length).clamp(max=case.rows).to(device)
        shared_gates = (1 - gates.detach()[:, 0]).requires_grad_()
        ids = ids.sort(dim=0).values  # batches are sorted by language
        plan = RoutingPlan(ids.to(device), gates, case.experts, "segment", segments, shared_gates)
    else:
        # Slices of a dense layer are not weighed.
        gates = torch.ones_like(gates) if case.kind == "slices" else gates
        plan = RoutingPlan(ids.to(device), gates, case.experts)
    return _fill(case, plan, generator)


def make_dense(case: Case, device: torch.device) -> Problem:
    """The tensors of `Case.dense`."""
    dense = case.dense()
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    segments = torch.tensor([0, dense.rows], device=device)
    shared_gates = torch.ones(1, device=device) if case.kind == "language" else None
    plan = RoutingPlan(ids, torch.ones(1, 1, device=device), 1, "segment", segments, shared_gates)
    return _fill(dense, plan, torch.Generator().manual_seed(1))


def _fill(case: Case, plan: RoutingPlan, generator: torch.Generator) -> Problem:
    device, dtype = plan.gates.device, getattr(torch, case.dtype)
    shared = plan.shared_gates is not None
    experts = Experts(plan.num_experts, case.d_model, case.d_ff, case.activation, case.bias, shared)
    for parameter in experts.parameters():
        bound = 1 / (case.d_model**0.5 if parameter.shape[-1] == case.d_model else case.d_ff**0.5)
        torch.nn.init.uniform_(parameter, -bound, bound, generator)
    x_ND, dy_ND = (torch.randn(case.rows, case.d_model, generator=generator) for _ in range(2))
    return Problem(x_ND.to(device, dtype).requires_grad_(), plan, experts.to(device, dtype), dy_ND.to(device, dtype))


def _draw_ids(case: Case, units: int, generator: torch.Generator) -> Tensor:
    """Different experts for each unit, int32 [units, K]: the largest of scores with Gumbel noise."""
    uniform_UE = torch.rand(units, case.experts, generator=generator).clamp(min=1e-9)
    scores_UE = -(-uniform_UE.log()).log()
    if case.skew == "skewed":
        scores_UE -= 2 * torch.arange(1, case.experts + 1).log()
    return scores_UE.topk(case.top_k).indices.int()


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
