"""Fits MoEfication's learned router, and says how well a router chooses.

Shape letters: N rows, E slices, D model width.
"""

import torch
from torch import Tensor

from mole_asr.moe.convert.sliced import SlicedLayer
from mole_asr.moe.losses import activation_loss
from mole_asr.moe.pseudo_labels import activation_mass
from mole_asr.moe.routers import MLPRouter

_HELD_OUT = 0.1


def fit_mlp_router(
    router: MLPRouter,
    x_ND: Tensor,
    mass_NE: Tensor,
    epochs: int = 30,
    batch: int = 512,
    lr: float = 0.01,
    seed: int = 0,
) -> float:
    """Trains a router to say how strongly each slice fires, and keeps its best epoch.

    Zhang et al., arXiv 2110.01786: Adam 0.01, batches of 512, 30 epochs, 90 % of the rows to train on, 10 % to choose
    the epoch by (their published code keeps the second best).

    Args:
        router: to train in place; it starts as the centroids.
        x_ND: rows, valid ones only; at least two.
        mass_NE: as `activation_mass` gives it for them.
        epochs: over the rows.
        batch: rows of a step.
        lr: of Adam.
        seed: of the order, and of which rows are held out.

    Returns:
        Cross-entropy on the held-out rows.

    Raises:
        ValueError: fewer than two rows, no epoch, or activations that are no numbers.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    if len(x_ND) < 2:
        raise ValueError(f"a router needs rows to learn from and rows to be tested on, not {len(x_ND)} rows")
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(len(x_ND), generator=generator).to(x_ND.device)
    held_out, train = order_N.split(
        [max(1, int(_HELD_OUT * len(x_ND))), len(x_ND) - max(1, int(_HELD_OUT * len(x_ND)))]
    )
    optimizer = torch.optim.Adam(router.parameters(), lr)
    best, kept = torch.inf, {name: value.clone() for name, value in router.state_dict().items()}
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=generator).to(train.device)].split(batch):
            loss = activation_loss(router(x_ND[rows]), mass_NE[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = float(activation_loss(router(x_ND[held_out]), mass_NE[held_out]))
        if found < best:
            best, kept = found, {name: value.clone() for name, value in router.state_dict().items()}
    if best == torch.inf:
        raise ValueError("the router learned nothing: rows or activations are infinite or no numbers")
    router.load_state_dict(kept)
    return best


@torch.no_grad()
def mass_kept(layer: SlicedLayer, x_ND: Tensor) -> float:
    """Share of all activations that lies in the slices which the layer's router chooses; that of the oracle is best."""
    x_ND = x_ND.to(layer.groups_EF.device)
    mass_NE = activation_mass(x_ND, layer.experts).float()
    assert layer.router is not None
    chosen_NK = layer.router(x_ND).expert_ids.long()
    return float(mass_NE.gather(-1, chosen_NK).sum() / mass_NE.sum().clamp(min=1e-20))
