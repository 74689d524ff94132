"""Expert parallelism: every rank holds some of the experts, and rows travel to the experts that compute them.

A row travels once, with its gates, to each rank that has experts for it. That rank computes its experts' weighted sum
with `dispatch`, as for rows of its own, and sends it back; at home the sums of all ranks are added up. Slots without
an expert travel nowhere. Router and shared expert stay on every rank; losses and statistics are of a rank's own rows.

    mesh = init_device_mesh("cuda", (ranks,))
    parallelize_experts(model, mesh)

Shape letters: N rows of this rank, P rows it sends (one a row and rank), Q rows it receives, K experts a row, R ranks,
D model width.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mole_asr.moe.dispatch import Backend, dispatch
from mole_asr.moe.experts import Experts
from mole_asr.moe.plan import RoutingPlan


def parallelize_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the experts of all layers in a model over ranks, in place: the stacked parameters become DTensors.

    Every rank takes its experts from the first rank's. E need not be a multiple of the ranks: the last has fewer then.
    Call it before an optimizer or `DistributedDataParallel` is made.

    All ranks must call all layers in the same order, also those without rows, and agree on what requires a gradient:
    they wait for each other, forward and backward. An expert's gradient is the sum over the rows of all ranks, so sum
    the other parameters' (router, shared expert) over ranks too. `DistributedDataParallel` averages them and must be
    told to ignore DTensors (its `_set_params_and_buffers_to_ignore_for_model`): with it, divide the experts' gradients
    by the number of ranks. `OracleRouter` and `pseudo_labels` look into all experts, and cannot do so afterwards.

    Args:
        model: a `MoELayer`, `Experts`, or anything that holds some.
        mesh: the ranks to spread over, of one dimension; `mesh["name"]` is one dimension of a larger mesh.

    Raises:
        ValueError: a mesh of several dimensions, experts that are spread already, or a rank would have no expert.
    """
    if mesh.ndim != 1:
        raise ValueError(f"the mesh must have one dimension, not {mesh.ndim}: choose one with mesh['name']")
    found = [module for module in model.modules() if isinstance(module, Experts)]
    for experts in found:  # all are checked before the first is changed
        share = -(-experts.num_experts // mesh.size())
        if share * (mesh.size() - 1) >= experts.num_experts:
            raise ValueError(
                f"{experts.num_experts} experts leave a rank of {mesh.size()} without any: use fewer ranks"
            )
        if isinstance(experts.w1_EFD, DTensor):
            raise ValueError("these experts are spread over ranks already")
    for experts in found:
        for name, tensor in zip(("w1_EFD", "b1_EF", "w2_EDF", "b2_ED"), experts.stack(), strict=True):
            if tensor is not None:
                spread = distribute_tensor(tensor.detach(), mesh, [Shard(0)])
                setattr(experts, name, nn.Parameter(spread, requires_grad=tensor.requires_grad))


def dispatch_parallel(x_ND: Tensor, plan: RoutingPlan, experts: Experts, backend: Backend) -> Tensor:
    """Compute a plan with experts that are spread over ranks: `dispatch` calls it. Waits for the device once a plan.

    The ranks exchange rows, so all of them must call it, in the same order of layers.
    """
    assert isinstance(experts.w1_EFD, DTensor)
    mesh = experts.w1_EFD.device_mesh
    if ("parallel", mesh) not in plan.schedules:
        plan.schedules["parallel", mesh] = _plan_route(plan.to_token_layout(x_ND.shape[0]), mesh)
    route: _Route = plan.schedules["parallel", mesh]
    plan, group, own = plan.to_token_layout(x_ND.shape[0]), mesh.get_group(), _own_experts(experts)
    x_QD = _Exchange.apply(x_ND.index_select(0, route.rows_P), route.sent, route.received, group)
    gates_QK = _Exchange.apply(plan.gates.index_select(0, route.rows_P), route.sent, route.received, group)
    backend = "auto" if backend == "segment" else backend  # what comes from other ranks has lost its segments
    y_QD = dispatch(x_QD, RoutingPlan(route.ids_QK, gates_QK, own.num_experts), own, backend)
    y_PD = _Exchange.apply(y_QD, route.received, route.sent, group)
    y_ND = torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))
    y_ND = y_ND.index_add(0, route.rows_P, y_PD.to(y_ND.dtype))
    if plan.shared_gates is not None:
        no_expert = torch.full_like(plan.expert_ids[:, :1], own.num_experts)
        only_shared = RoutingPlan(
            no_expert, plan.gates[:, :1].detach(), own.num_experts, shared_gates=plan.shared_gates
        )
        y_ND = y_ND + dispatch(x_ND, only_shared, own, backend)
    return y_ND.to(x_ND.dtype)


class _Route(NamedTuple):
    """How the rows of a plan travel; integers only, so that the layers that share a plan work it out once."""

    rows_P: Tensor
    ids_QK: Tensor
    sent: list[int]
    received: list[int]


def _plan_route(plan: RoutingPlan, mesh: DeviceMesh) -> _Route:
    """Find which rows each rank needs, and tell it how many come and which experts they want."""
    group, ranks = mesh.get_group(), mesh.size()
    share = -(-plan.num_experts // ranks)  # Shard(0) cuts as torch.chunk does
    owner_NK = (plan.expert_ids // share).where(plan.expert_ids < plan.num_experts, ranks).long()
    needs_NR = torch.zeros(plan.num_units, ranks + 1, dtype=torch.bool, device=owner_NK.device)
    needs_NR = needs_NR.scatter(1, owner_NK, True)[:, :ranks]
    sent_R = needs_NR.sum(0)
    received_R = torch.empty_like(sent_R)
    dist.all_to_all_single(received_R, sent_R, group=group)
    sent, received = torch.stack([sent_R, received_R]).tolist()  # the sizes of what follows: the one wait
    rows_P = needs_NR.t().nonzero_static(size=sum(sent))[:, 1]
    ids_QK = _Exchange.apply(plan.expert_ids.index_select(0, rows_P), sent, received, group)
    first = share * mesh.get_local_rank()
    count = min(share, plan.num_experts - first)
    is_own_QK = (ids_QK >= first) & (ids_QK < first + count)
    return _Route(rows_P, (ids_QK - first).where(is_own_QK, count), sent, received)


def _own_experts(experts: Experts) -> Experts:
    """The experts of this rank and the shared one, as a module of ordinary tensors; gradients reach the parameters."""
    own = copy.copy(experts)
    own._parameters = {}
    for name, tensor in experts._parameters.items():
        setattr(own, name, tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    own.num_experts = own.w1_EFD.shape[0]
    return own


class _Exchange(torch.autograd.Function):
    """Give `sent[r]` consecutive rows to each rank r and take `received[r]` from it; gradients travel back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = grad.new_empty(sum(ctx.sent), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None
