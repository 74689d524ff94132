"""Dense parts to sliced layers: cut, check, fit routers. What the verbs and the recipes share.

Letters: N rows, H neurons, E slices.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_asr.convert.host import DensePart, draw_rows, hidden_activations
from mole_asr.errors import MoleError
from mole_asr.moe.convert.fitting import fit_mlp_router
from mole_asr.moe.convert.sliced import RouterKind, SlicedFeedForward, SlicedLayer
from mole_asr.moe.convert.splits import Split, make_groups
from mole_asr.moe.experts import ExpertWeights, feed_forward
from mole_asr.moe.pseudo_labels import activation_mass
from mole_asr.moe.routers import MLPRouter

IDENTITY = 1e-9
"""How far all slices together may be from the dense part, in float64, over its largest output."""
FIDELITY, NARROW_FIDELITY = 1e-3, 2e-2
"""How far two products and an activation may be from what the model runs, in its own type, over its largest output;
the second for types narrower than float32."""
_CHECKED_ROWS = 256

Rows = Mapping[str, Tensor]
"""Rows [N, D] that each part gets in real use."""

SHOWN_ROWS = 4096
"""Rows a part by which it is compared with its slices."""
CUT_ROWS = 20_000
"""Rows a part by which it is cut, and routers are fitted before any training."""


@dataclass(frozen=True)
class Cut:
    """How parts are cut.

    Attributes:
        split: which neurons make a slice.
        slices: E.
        active: slices that compute a row.
        router: who chooses.
        seed: of what is drawn.
    """

    split: Split
    slices: int
    active: int
    router: RouterKind
    seed: int = 0

    @property
    def needs_rows(self) -> bool:
        """Whether calibration data are needed."""
        return self.split == "coactivation" or self.router == "mlp"


def active_slices(share: float, slices: int) -> int:
    """How many slices are the given share of all, at least one.

    Raises:
        MoleError: the share is none, or there are no slices.
    """
    if slices < 1:
        raise MoleError(f"--slices {slices}: must be positive")
    if not 0 < share <= 1:
        raise MoleError(f"--share {share:g}: must be above 0 and at most 1")
    return max(1, round(share * slices))


def slice_parts(parts: Mapping[str, DensePart], cut: Cut, rows: Rows | None = None) -> dict[str, SlicedLayer]:
    """Cuts all parts and checks each.

    Args:
        parts: of a host; they stay as they are.
        cut: how.
        rows: of each part, where the cut needs some.

    Raises:
        MoleError: a part cannot be cut so, computes more than slices do, or its slices together are not the part.
    """
    if not parts:
        raise MoleError("the model has no dense feed-forward part that could be cut; give one that was not converted")
    layers = {}
    for name, part in parts.items():
        x_ND = None if rows is None else rows[name]
        narrow = torch.finfo(part.weights.w1_FD.dtype).bits < 32
        if not model_error(part, x_ND) < (NARROW_FIDELITY if narrow else FIDELITY):
            raise MoleError(f"{name}: computes more than two products and an activation; it cannot be sliced")
        activations = hidden_activations(part, x_ND) if cut.split == "coactivation" and x_ND is not None else None
        try:
            groups_EF = make_groups(cut.split, part.weights, cut.slices, activations, cut.seed)
            layer = SlicedLayer.from_dense(part.weights, groups_EF, part.activation, cut.router, cut.active)
        except ValueError as error:
            raise MoleError(f"{name}: {error}; choose another --slices or --split") from None
        fit_router(layer, x_ND, cut.seed)
        far = identity_error(part, layer, x_ND)
        if not far < IDENTITY:  # not a number is wrong too
            raise MoleError(f"{name}: all slices together differ from the dense part by {far:.1e}; nothing was saved")
        layers[name] = layer.eval()
    return layers


def fit_router(layer: SlicedLayer, x_ND: Tensor | None, seed: int = 0) -> None:
    """Trains the router, if it is one that is fitted to rows.

    Raises:
        MoleError: there are no rows.
    """
    if not isinstance(layer.router, MLPRouter):
        return
    if x_ND is None or len(x_ND) < 2:
        raise MoleError("--router mlp: learns from data; give --data")
    x_ND = x_ND.to(layer.groups_EF.device)
    fit_mlp_router(layer.router, x_ND, activation_mass(x_ND, layer.experts).float(), seed=seed)


@torch.no_grad()
def identity_error(part: DensePart, layer: SlicedLayer, x_ND: Tensor | None = None) -> float:
    """Largest difference between all slices together and the dense part, in float64, over the largest output.

    Args:
        part: the dense part.
        layer: its slices.
        x_ND: rows to compare on; None, or fewer than one, for drawn ones.
    """
    x_ND = _checked_rows(part, x_ND).double()
    wide = copy.deepcopy(layer).double()
    weights = ExpertWeights._make(None if tensor is None else tensor.double() for tensor in part.weights)
    expected_ND = feed_forward(x_ND, weights, part.activation)
    lengths = torch.tensor([len(x_ND)], device=x_ND.device)
    found_ND = wide(x_ND[None], lengths, plan=wide.all_slices(len(x_ND)))[0][0]
    return float((found_ND - expected_ND).abs().amax() / expected_ND.abs().amax().clamp(min=1e-30))


@torch.no_grad()
def model_error(part: DensePart, x_ND: Tensor | None = None) -> float:
    """Largest difference between a part as the model runs it and its weights alone, over the largest output.

    A module may have the names of a known style and compute more: a norm in between, say, or multipliers.

    Args:
        part: the dense part.
        x_ND: rows to compare on; None, or fewer than one, for drawn ones.
    """
    x_ND = _checked_rows(part, x_ND)
    expected_ND, found_ND = part.run(x_ND).double(), feed_forward(x_ND, part.weights, part.activation).double()
    return float((found_ND - expected_ND).abs().amax() / expected_ND.abs().amax().clamp(min=1e-30))


def _checked_rows(part: DensePart, x_ND: Tensor | None) -> Tensor:
    w1_FD = part.weights.w1_FD
    if x_ND is None or not len(x_ND):
        x_ND = torch.randn(_CHECKED_ROWS, w1_FD.shape[1], generator=torch.Generator().manual_seed(0))
    return draw_rows(x_ND, _CHECKED_ROWS).to(w1_FD)


@torch.no_grad()
def output_error(part: DensePart, layer: SlicedLayer, x_ND: Tensor) -> float:
    """How far the chosen slices are from the dense part: norm of the difference over that of the dense output."""
    x_ND = x_ND.to(layer.groups_EF.device, part.weights.w1_FD.dtype)
    dense_ND = feed_forward(x_ND, part.weights, part.activation)
    return float((SlicedFeedForward(layer)(x_ND) - dense_ND).norm() / dense_ND.norm().clamp(min=1e-30))
