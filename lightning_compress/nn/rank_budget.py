"""Choosing ranks under a budget: what a layer costs at a rank, and which directions fit into a total.

Shape legend: M full rank of a layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LayerSize", "choose_ranks", "layer_cost", "smallest_size"]


@dataclass(frozen=True)
class LayerSize:
    """Shape of one linear layer."""

    in_features: int
    out_features: int
    extra_rank: int = 0
    """Rank that comes on top of any rank kept: of adapters that are folded in."""

    @property
    def dense(self) -> int:
        """Weights in dense form."""
        return self.in_features * self.out_features

    @property
    def full_rank(self) -> int:
        """min(in, out)."""
        return min(self.in_features, self.out_features)

    @property
    def break_even(self) -> float:
        """Rank at which two factors hold as many weights as the dense form: o i / (o + i)."""
        return self.dense / (self.in_features + self.out_features)


def layer_cost(size: LayerSize, rank: int, multiple: int, dense_above: float) -> int:
    """Weights of a layer kept at a rank: two factors at the rounded-up rank, or dense where those do not pay.

    Paper: STAR-KV official code charges min(r (o + i), o i); rounding up and charging the rounded rank are later fixes.

    Example:
        >>> layer_cost(LayerSize(768, 768), rank=100, multiple=16, dense_above=0.75)
        172032
        >>> layer_cost(LayerSize(768, 768), rank=300, multiple=16, dense_above=0.75) == 768 * 768
        True
    """
    rounded = _round_up(rank, multiple, size) + size.extra_rank
    factors = rounded * (size.in_features + size.out_features)
    return factors if factors < dense_above * size.dense else size.dense


def smallest_size(sizes: Mapping[str, LayerSize], multiple: int, dense_above: float) -> int:
    """Weights of all layers at the lowest rank that a multiple allows."""
    return sum(layer_cost(size, 1, multiple, dense_above) for size in sizes.values())


def choose_ranks(
    margins: Mapping[str, Tensor],
    sizes: Mapping[str, LayerSize],
    budget: int,
    multiple: int,
    dense_above: float,
) -> dict[str, int]:
    """Grow all layers from the lowest rank, best margin first, until nothing more fits into the budget.

    A layer grows by whole multiples, each worth its best margin; when its factors stop paying it goes to full rank
    and is charged as dense. A layer whose next step does not fit stops there, others go on.

    Args:
        margins: Worth of each direction, shape ``[M]``, any order.
        sizes: Shape of each layer.
        budget: Weights all layers may hold together, at least :func:`smallest_size`.
        multiple: Ranks are multiples of this (or the full rank).
        dense_above: Share of the dense weights above which a layer is charged as dense.

    Returns:
        Kept rank of each layer; the full rank means dense.

    Example:
        >>> import torch
        >>> sizes = {"a": LayerSize(8, 8), "b": LayerSize(8, 8)}
        >>> margins = {"a": torch.tensor([5.0, 4, 3, 0, 0, 0, 0, 0]), "b": torch.tensor([2.0, 1, 0, 0, 0, 0, 0, 0])}
        >>> choose_ranks(margins, sizes, budget=64, multiple=1, dense_above=0.9)
        {'a': 3, 'b': 1}
    """
    ordered = {path: margin_M.sort(descending=True).values.tolist() for path, margin_M in margins.items()}
    ranks = {path: _snap(sizes[path], 1, multiple, dense_above) for path in sizes}
    spent = sum(layer_cost(size, ranks[path], multiple, dense_above) for path, size in sizes.items())
    queue = [(-ordered[path][ranks[path]], path) for path in sizes if ranks[path] < sizes[path].full_rank]
    heapq.heapify(queue)
    while queue:
        _, path = heapq.heappop(queue)
        size, rank = sizes[path], ranks[path]
        grown = _snap(size, rank + 1, multiple, dense_above)
        extra = layer_cost(size, grown, multiple, dense_above) - layer_cost(size, rank, multiple, dense_above)
        if spent + extra <= budget:
            ranks[path], spent = grown, spent + extra
            if grown < size.full_rank:
                heapq.heappush(queue, (-ordered[path][grown], path))
    return ranks


def _snap(size: LayerSize, rank: int, multiple: int, dense_above: float) -> int:
    """The rank really kept for a wish: rounded up, or full where the layer is charged as dense."""
    is_dense = layer_cost(size, rank, multiple, dense_above) == size.dense
    return size.full_rank if is_dense else _round_up(rank, multiple, size)


def _round_up(rank: int, multiple: int, size: LayerSize) -> int:
    """The rank to keep so that it is, with the extra rank, a multiple."""
    together = -(-(max(rank, 1) + size.extra_rank) // multiple) * multiple
    return min(together - size.extra_rank, size.full_rank)
