"""How the neurons of a dense FFN are split into groups of equal size, one a slice (MoEfication, Zhang et al., 2021).

| split | neurons of a group |
|---|---|
| contiguous | stand beside one another, as FactorLLM's published code cuts |
| random | are drawn |
| clusters | look for the same thing: balanced k-means of the normalised rows of the first matrix |
| coactivation | fire together: balanced partition of a graph whose edges are sums over rows of a_n a_m |

Balanced clusters and partitions are found by swaps of two neurons between two groups, the best ones first, until none
helps: exact for two clusters with given centres, a local optimum otherwise.

Shape letters: H neurons, E groups (experts), F = H / E neurons of a group, C coordinates of a point, N rows.
"""

from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from mole_asr.moe.convert.slices import contiguous_groups
from mole_asr.moe.experts import ExpertWeights

Split = Literal["contiguous", "random", "clusters", "coactivation"]
_GAIN = 1e-9  # a swap must win more, or rounding would let two neurons change places for ever
_ROUNDS = 30
_SWEEPS = 6


def make_groups(
    split: Split, dense: ExpertWeights, num_groups: int, activations_NH: Tensor | None = None, seed: int = 0
) -> Tensor:
    """The neurons of each group, int64 [E, F], in rising order.

    Args:
        split: how.
        dense: the tensors of the dense FFN, as `slice_dense` takes them.
        num_groups: E.
        activations_NH: of its neurons on some rows; for "coactivation".
        seed: of what is drawn.

    Raises:
        ValueError: the split is unknown, the neurons cannot be divided evenly, or activations are missing.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}, not {split!r}")
    d_ff = dense.w2_DF.shape[1]
    plain_EF = contiguous_groups(d_ff, num_groups)
    generator = torch.Generator().manual_seed(seed)
    if split == "contiguous":
        return plain_EF
    if split == "random":
        return torch.randperm(d_ff, generator=generator).view(num_groups, -1).sort(-1).values
    if split == "clusters":
        # Of a gated FFN its gate: what decides whether a neuron fires.
        return balanced_clusters(functional.normalize(dense.w1_FD[:d_ff].float(), dim=-1), num_groups, generator)
    if activations_NH is None:
        raise ValueError("the split by co-activation needs activations")
    return balanced_partition(coactivation_graph(activations_NH), num_groups, generator)


def balanced_clusters(points_HC: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """k-means with clusters of equal size (Malinen & Fränti, 2014, with swaps for the Hungarian algorithm): [E, F]."""
    points_HC = points_HC.detach().cpu()
    centres_EC = _far_points(points_HC, num_groups, generator)
    labels_H: Tensor | None = None
    for _ in range(_ROUNDS):
        cost_HE = torch.cdist(points_HC, centres_EC).square()
        new_H = balanced_assignment(cost_HE, labels_H)
        if labels_H is not None and torch.equal(new_H, labels_H):
            break
        labels_H = new_H
        centres_EC = torch.stack([points_HC[labels_H == group].mean(0) for group in range(num_groups)])
    assert labels_H is not None
    return groups_of(labels_H, num_groups)


def _far_points(points_HC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """First centres as k-means++ draws them: each with a probability that grows with its distance to those before."""
    chosen = [int(torch.randint(len(points_HC), (1,), generator=generator))]
    distance_H = torch.full((len(points_HC),), torch.inf)
    for _ in range(count - 1):
        distance_H = distance_H.minimum((points_HC - points_HC[chosen[-1]]).square().sum(-1))
        # Where all points are the same, any will do.
        weights_H = distance_H if float(distance_H.sum()) > 0 else torch.ones_like(distance_H)
        chosen.append(int(torch.multinomial(weights_H, 1, generator=generator)))
    return points_HC[chosen]


def balanced_assignment(cost_HE: Tensor, labels_H: Tensor | None = None) -> Tensor:
    """Points to groups of H / E points each, at little cost: int64 [H].

    Args:
        cost_HE: of each point in each group.
        labels_H: a balanced assignment to improve; None starts with the points that have most to lose.

    Returns:
        No swap of two points lowers the sum of the costs.
    """
    num_groups = cost_HE.shape[1]
    labels_H = _first_assignment(cost_HE) if labels_H is None else labels_H.clone()
    for _ in range(_SWEEPS * num_groups):
        changed = False
        for a, b in combinations(range(num_groups), 2):
            of_a, of_b = (labels_H == a).nonzero()[:, 0], (labels_H == b).nonzero()[:, 0]
            gain_a, order_a = (cost_HE[of_a, a] - cost_HE[of_a, b]).sort(descending=True)
            gain_b, order_b = (cost_HE[of_b, b] - cost_HE[of_b, a]).sort(descending=True)
            count = int((gain_a + gain_b > _GAIN).sum())  # a run from the first, as both fall
            if count:
                labels_H[of_a[order_a[:count]]], labels_H[of_b[order_b[:count]]] = b, a
                changed = True
        if not changed:
            break
    return labels_H


def _first_assignment(cost_HE: Tensor) -> Tensor:
    """Greedy: the points whose second choice is worst come first; each takes the cheapest group that has room."""
    points, num_groups = cost_HE.shape
    room = [points // num_groups] * num_groups
    labels = [0] * points
    ranked_HE = cost_HE.argsort(-1)
    best_two_H2 = cost_HE.sort(-1).values[:, :2]
    order_H = (best_two_H2[:, -1] - best_two_H2[:, 0]).argsort(descending=True)
    choices = ranked_HE.tolist()
    for point in order_H.tolist():
        group = next(group for group in choices[point] if room[group])
        labels[point] = group
        room[group] -= 1
    return torch.tensor(labels)


def coactivation_graph(activations_NH: Tensor) -> Tensor:
    """float32 [H, H]: how much two neurons fire together, sum over rows of |a_n| |a_m|; zero on the diagonal.

    MoEfication's graph, whose ReLU activations are not negative; absolute values for other activations are ours.
    """
    strength_NH = activations_NH.detach().float().abs().cpu()
    return (strength_NH.t() @ strength_NH).fill_diagonal_(0)


def balanced_partition(graph_HH: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """Groups of equal size with much weight inside: [E, F].

    Begins with balanced clusters of the spectral embedding (Ng, Jordan & Weiss, 2001), then swaps neurons as Kernighan
    & Lin (1970) do, pair of groups by pair of groups.
    """
    if num_groups == 1:
        return torch.arange(len(graph_HH))[None]
    root_H = graph_HH.sum(-1).clamp(min=1e-12).rsqrt()
    vectors_HH = torch.linalg.eigh(root_H[:, None] * graph_HH * root_H).eigenvectors
    embedding_HE = functional.normalize(vectors_HH[:, -num_groups:], dim=-1)
    groups_EF = balanced_clusters(embedding_HE, num_groups, generator)
    labels_H = torch.empty(len(graph_HH), dtype=torch.long)
    labels_H[groups_EF.flatten()] = torch.arange(num_groups).repeat_interleave(groups_EF.shape[1])
    return groups_of(_swap(graph_HH, labels_H, num_groups), num_groups)


def _swap(graph_HH: Tensor, labels_H: Tensor, num_groups: int) -> Tensor:
    """Swaps two neurons of two groups as long as that brings weight inside, at most so many sweeps."""
    labels_H, scale = labels_H.clone(), float(graph_HH.amax().clamp(min=1e-12))
    ties_HE = graph_HH @ functional.one_hot(labels_H, num_groups).to(graph_HH.dtype)  # of a neuron to each group
    for _ in range(_SWEEPS):
        swaps = 0
        for a, b in combinations(range(num_groups), 2):
            for _ in range(len(labels_H) // num_groups):
                of_a, of_b = (labels_H == a).nonzero()[:, 0], (labels_H == b).nonzero()[:, 0]
                gain_FF = (ties_HE[of_a, b] - ties_HE[of_a, a])[:, None] + (ties_HE[of_b, a] - ties_HE[of_b, b])
                gain_FF = gain_FF - 2 * graph_HH[of_a][:, of_b]  # their own tie is between the groups before and after
                best = int(gain_FF.argmax())
                if float(gain_FF.flatten()[best]) <= 1e-4 * scale:
                    break
                i, j = of_a[best // len(of_b)], of_b[best % len(of_b)]
                labels_H[i], labels_H[j] = b, a
                moved_H = graph_HH[:, i] - graph_HH[:, j]
                ties_HE[:, b] += moved_H
                ties_HE[:, a] -= moved_H
                swaps += 1
        if not swaps:
            break
    return labels_H


def groups_of(labels_H: Tensor, num_groups: int) -> Tensor:
    """The members of each group, in rising order: [E, F]."""
    return labels_H.argsort(stable=True).view(num_groups, -1)
