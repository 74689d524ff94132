"""A sliced FFN that can be saved with its model, and built again from what was saved.

Shape letters: E slices, D model width, H width of the dense FFN, F = H / E width of a slice, N rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from mole_asr.moe.convert.slices import contiguous_groups, slice_dense
from mole_asr.moe.experts import GATED, Activation, ExpertWeights
from mole_asr.moe.layer import MoELayer
from mole_asr.moe.plan import RoutingPlan
from mole_asr.moe.pseudo_labels import prior_approximate_labels
from mole_asr.moe.routers import (
    CentroidRouter,
    MLPRouter,
    OracleRouter,
    PseudoLabelRouter,
    Router,
    RoutingContext,
    expert_centroids,
)
from mole_asr.moe.routers.base import check_k, need_rows
from mole_asr.moe.rows import PackedRows

RouterKind = Literal["centroid", "mlp", "oracle", "linear", "prior_oracle"]


@dataclass(frozen=True)
class SliceConfig:
    """Sizes and switches of one sliced FFN.

    Attributes:
        d_model: D.
        d_ff: H.
        slices: E.
        active: slices that compute a row.
        activation: of the dense FFN.
        bias: whether it has biases.
        router: "centroid", "mlp" and "oracle" of MoEfication; "linear" (`PseudoLabelRouter`) and its oracle
            "prior_oracle" of FactorLLM, which scale the sum of the chosen slices by E / active.
    """

    d_model: int
    d_ff: int
    slices: int
    active: int
    activation: Activation
    bias: bool
    router: RouterKind

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: one is wrong.
        """
        contiguous_groups(self.d_ff, self.slices)
        check_k(self.active, self.slices)
        if self.router not in get_args(RouterKind):
            raise ValueError(f"the router must be one of {', '.join(get_args(RouterKind))}, not {self.router!r}")


class SlicedLayer(MoELayer):
    """The slices of one dense FFN with a router, and which neurons they were.

    Args:
        config: sizes and switches; parameters are to be loaded.

    Attributes:
        config: sizes and switches.
        groups_EF: neurons of each slice, in the order of the dense FFN.
    """

    groups_EF: Tensor

    def __init__(self, config: SliceConfig) -> None:
        width = config.d_ff // config.slices
        super().__init__(
            config.d_model, width, config.slices, None, config.activation, config.bias, backend="auto", slices=True
        )
        self.config = config
        self.register_buffer("groups_EF", contiguous_groups(config.d_ff, config.slices))
        self.choose_router(config.router, config.active)

    @classmethod
    def from_dense(
        cls, dense: ExpertWeights, groups_EF: Tensor, activation: Activation, router: RouterKind, active: int
    ) -> Self:
        """Cuts a dense FFN; a router that learns is not trained yet. See `slice_dense`.

        Raises:
            ValueError: the tensors, the groups and the number of slices do not fit together.
        """
        d_model, d_ff = dense.w2_DF.shape
        cut = slice_dense(dense, groups_EF, activation)
        config = SliceConfig(d_model, d_ff, len(groups_EF), active, activation, cut.bias_D is not None, router)
        layer = cls(config)
        layer.experts, layer.bias_D = cut.experts, cut.bias_D
        layer.groups_EF = groups_EF.to(dense.w2_DF.device).clone()
        layer.choose_router(router, active)
        return layer

    def choose_router(self, kind: RouterKind, active: int, router: Router | None = None) -> None:
        """Gives the layer a router of this kind: a fresh one, or this one.

        Raises:
            ValueError: more slices are to be active than there are.
        """
        self.config = replace(self.config, router=kind, active=active)
        self.router = make_router(kind, self, active) if router is None else router

    def all_slices(self, num_rows: int) -> RoutingPlan:
        """The plan with which the layer is the dense FFN."""
        device, count = self.groups_EF.device, self.config.slices
        ids_NK = torch.arange(count, dtype=torch.int32, device=device).expand(num_rows, count)
        return RoutingPlan(ids_NK.contiguous(), torch.ones(num_rows, count, device=device), count)

    def merged(self) -> ExpertWeights:
        """The dense FFN that all slices are together, its neurons in their old order."""
        w1, b1, w2, _ = self.experts.stack()
        parts = 2 if self.config.activation in GATED else 1
        order_H = self.groups_EF.flatten().argsort()

        def rows(stack: Tensor) -> Tensor:
            """[E, parts x F, ...] -> [parts x H, ...]."""
            pieces = stack.unflatten(1, (parts, -1)).transpose(0, 1).flatten(1, 2)
            return pieces[:, order_H].flatten(0, 1).detach()

        w2_DF = w2.transpose(0, 1).flatten(1)[:, order_H].detach()
        return ExpertWeights(
            rows(w1), None if b1 is None else rows(b1), w2_DF, None if self.bias_D is None else self.bias_D.detach()
        )


def make_router(kind: RouterKind, layer: SlicedLayer, active: int) -> Router:
    """A router of a layer; one that learns is as it starts.

    Raises:
        ValueError: more slices are to be active than there are.
    """
    if kind == "oracle":
        return OracleRouter(layer.experts, active)
    if kind == "prior_oracle":
        return PriorOracleRouter(layer, active)
    if kind == "linear":
        weight = layer.experts.w1_EFD
        router = PseudoLabelRouter(layer.experts.d_model, layer.experts.num_experts, active)
        return router.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    centroids_ED = expert_centroids(layer.experts)
    centroids_ED = centroids_ED.to(torch.promote_types(centroids_ED.dtype, torch.float32))
    return (CentroidRouter if kind == "centroid" else MLPRouter)(centroids_ED, active)


class PriorOracleRouter(Router):
    """The slices that FactorLLM's labels name, at the price of the dense FFN; scaled as its router scales.

    Plan: layout "token", all gates E / k. aux: "probabilities" [N, E], the labels.

    Args:
        layer: that this router serves.
        k: slices a row.

    Raises:
        ValueError: k is not within 1..E.
    """

    def __init__(self, layer: SlicedLayer, k: int) -> None:
        super().__init__()
        check_k(k, layer.experts.num_experts)
        self.k = k
        self._experts = (layer.experts,)  # in a tuple, so that they are not saved as parameters of the router too

    def forward(self, x_ND: Tensor | None, context: RoutingContext | None = None) -> RoutingPlan:
        """Make the plan of these rows.

        Raises:
            ValueError: no rows.
        """
        experts = self._experts[0]
        labels_NE = prior_approximate_labels(need_rows(self, x_ND), experts, self.k)
        labels_NE = labels_NE.to(torch.promote_types(labels_NE.dtype, torch.float32))
        ids_NK = labels_NE.topk(self.k, dim=-1).indices.int()
        gates_NK = labels_NE.new_full(ids_NK.shape, experts.num_experts / self.k)
        return RoutingPlan(ids_NK, gates_NK, experts.num_experts, aux={"probabilities": labels_NE})


class SlicedFeedForward(nn.Module):
    """A sliced layer where a model calls its feed-forward part with nothing but the stream: every row is computed.

    Args:
        layer: the slices.
        norm: what the part does first; None for nothing.
    """

    def __init__(self, layer: SlicedLayer, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.layer = layer

    @classmethod
    def around(cls, dense: nn.Module, layer: SlicedLayer) -> Self:
        """In the place of a dense part, with the LayerNorm of that part if it has one."""
        return cls(layer, next((child for child in dense.children() if isinstance(child, nn.LayerNorm)), None))

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Computes [..., D]; what else the model hands to its feed-forward parts is not looked at."""
        rows_ND = (x if self.norm is None else self.norm(x)).flatten(0, -2)
        size = torch.full((1,), len(rows_ND), device=x.device)
        ends = torch.stack([size[0] * 0, size[0]])
        y_1ND, _ = self.layer(rows_ND[None], rows=PackedRows(size, len(rows_ND), None, ends))
        return y_1ND.view_as(x)


def sliced_layers(model: nn.Module) -> dict[str, SlicedLayer]:
    """The sliced layers of a model, by the names of the parts that they stand for."""
    names = {id(module.layer): name for name, module in model.named_modules() if isinstance(module, SlicedFeedForward)}
    return {
        names.get(id(module), name): module for name, module in model.named_modules() if isinstance(module, SlicedLayer)
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """What a config must keep to build the sliced parts of a model again; nothing for a model without any."""
    found = {name: asdict(layer.config) for name, layer in sliced_layers(model).items()}
    return {"sliced": found} if found else {}


def rebuild(
    model: nn.Module,
    config: Mapping[str, Any],
    put: Callable[[nn.Module, SlicedLayer], nn.Module] = SlicedFeedForward.around,
) -> None:
    """Puts sliced parts, without weights, where a config says that they are; nothing for one that says nothing.

    Args:
        model: as it was before it was converted.
        config: that holds what `describe` gave.
        put: makes what stands in the place of a dense part, of that part and the slices.

    Raises:
        ValueError, TypeError, AttributeError: the config and the model do not fit together.
    """
    for name, values in config.get("sliced", {}).items():
        dense = model.get_submodule(name)
        model.set_submodule(name, put(dense, SlicedLayer(SliceConfig(**values))))
