"""The curriculum of adaptive gating: windows in the order of how many tokens needed a second expert, and where.

Li et al., EMNLP 2023, arXiv 2310.07188: the complexity vector of a sample holds, for each layer, the share of its
tokens that used two experts. An epoch begins with the sample of the fewest; the others follow by the cosine similarity
of their vectors to its own, the most similar first, so that a batch holds samples of like cost.

Ours: a vector is what the routers did when the window was last trained on, so that it costs nothing; the first epoch,
of which nothing is known yet, is shuffled. Where the first vector is all zero, no cosine is defined, and the mean share
decides.

Letters: W windows, B windows of a batch, L layers with experts.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mole_asr.moe.plan import RoutingPlan


def curriculum_order(shares_WL: np.ndarray) -> np.ndarray:
    """The places of the windows, int64 [W], in the order in which they are trained on; ties stay as they stand.

    Args:
        shares_WL: complexity vectors, 0..1.
    """
    if len(shares_WL) == 0:
        return np.zeros(0, np.int64)
    mean_W = shares_WL.mean(axis=1, dtype=np.float64)
    first = int(mean_W.argmin())
    if mean_W[first] == 0:
        return np.argsort(mean_W, kind="stable")
    # No vector is zero: none has fewer than the first.
    unit_WL = shares_WL / np.linalg.norm(shares_WL, axis=1, keepdims=True)
    # Rounded, as vectors of one direction shall tie.
    similarity_W = np.round(unit_WL @ unit_WL[first], 9)
    similarity_W[first] = np.inf
    return np.argsort(-similarity_W, kind="stable")


def two_expert_shares(plans: list[RoutingPlan], batch_size: int) -> Tensor:
    """Complexity vectors [B, L] of the windows of a batch, all of one length.

    Args:
        plans: of each layer with experts.
        batch_size: B.
    """
    shares = [(plan.expert_ids < plan.num_experts).sum(-1).gt(1).view(batch_size, -1).float().mean(1) for plan in plans]
    return torch.stack(shares, dim=1)


class Complexities:
    """The complexity vectors that each epoch left behind; what a checkpoint needs to go on with the same order.

    Args:
        num_windows: W.
    """

    def __init__(self, num_windows: int) -> None:
        self.num_windows = num_windows
        self._after: dict[int, Tensor] = {}

    def record(self, epoch: int, rows_B: Tensor, shares_BL: Tensor) -> None:
        """Notes what the routers did with windows in this epoch."""
        if epoch not in self._after:
            unknown_WL = torch.full((self.num_windows, shares_BL.shape[1]), torch.nan)
            self._after[epoch] = self._after.get(epoch - 1, unknown_WL).clone()
            # The order of this epoch comes from the one before; earlier ones are done with.
            self._after = {known: table for known, table in self._after.items() if known >= epoch - 1}
        self._after[epoch][rows_B.cpu()] = shares_BL.float().cpu()

    def order(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """These windows (int64, shuffled) in the order of the curriculum; those never seen come last, as they stand."""
        if epoch - 1 not in self._after:
            return rows
        shares_RL = self._after[epoch - 1].numpy()[rows]
        known_R = ~np.isnan(shares_RL).any(axis=1)
        return np.concatenate([rows[known_R][curriculum_order(shares_RL[known_R])], rows[~known_R]])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {str(epoch): table for epoch, table in self._after.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint; vectors of another number of windows are of other windows, and forgotten."""
        self._after = {int(epoch): table for epoch, table in state.items() if len(table) == self.num_windows}
