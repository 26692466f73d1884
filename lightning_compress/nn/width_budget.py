"""Choosing widths: how many heads, neurons and embedding ranks fit into a budget, and which of them stay.

The next chapter is :mod:`lightning_compress.nn.width_gate`.

Shape legend: L layers, G heads (groups of query heads that share key and value) and F neurons of a layer, K structures
of one kind in one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.nn.importance import LayerScores
from lightning_compress.nn.width_costs import Counts, LayerCost, WidthCosts

__all__ = ["choose_counts", "choose_kept", "default_multiple", "keep_best"]

_BISECTIONS = 40


def default_multiple(neurons: int) -> int:
    """Return the largest power of two up to 64 that is no more than a sixteenth of the neurons.

    Example:
        >>> default_multiple(3072), default_multiple(512), default_multiple(8)
        (64, 32, 1)
    """
    return next(m for m in (64, 32, 16, 8, 4, 2, 1) if 16 * m <= max(neurons, 16))


def choose_counts(
    costs: WidthCosts,
    budget: float,
    *,
    heads_L: Sequence[int] | None = None,
    neurons_L: Sequence[int] | None = None,
    embedding_rank: int | None = None,
    multiple: int,
    rank_multiple: int = 16,
    dense_cost: float | None = None,
) -> Counts:
    """Return the widest counts within a budget that keep about the same share of everything.

    Heads are rounded to the nearest whole number, word embeddings (where they count) to a multiple; neurons then fill
    what is left, in multiples, the same share in each layer. What is given stays as given.

    Args:
        costs: What things cost.
        budget: What they may cost together.
        heads_L: Heads of each layer, if given.
        neurons_L: Neurons of each layer, if given.
        embedding_rank: Rank of the word embeddings, if given; otherwise they are left whole where two factors are no
            smaller.
        multiple: Neurons are multiples of this.
        rank_multiple: The rank of the word embeddings is one of this.
        dense_cost: Cost of the model as it was, of which errors speak, if its hidden width has fallen since.

    Raises:
        ValueError: If even one head and one multiple of neurons in each layer cost more.

    Example:
        >>> costs = WidthCosts((LayerCost(4, 64, 100.0, 10.0),), fixed=40.0)
        >>> choose_counts(costs, 560.0, multiple=4)
        Counts(heads_L=(2,), neurons_L=(32,), embedding_rank=None, hidden=None)
    """
    full = costs.full

    def wished(share: float) -> Counts:
        """Return what a share would be, not rounded."""
        heads = heads_L or tuple(share * count for count in full.heads_L)
        neurons = neurons_L or tuple(share * count for count in full.neurons_L)
        rank = embedding_rank or (share * costs.hidden_size if costs.vocabulary else None)
        return Counts(heads, neurons, rank)  # type: ignore[arg-type]

    def filled(heads_share: float) -> tuple[Counts, float]:
        """Return rounded counts with as many neurons as fit, and what they cost."""
        heads = heads_L or [max(1, round(heads_share * count)) for count in full.heads_L]
        counts = Counts(tuple(heads), full.neurons_L, embedding_rank or _rank(costs, share, rank_multiple))
        if neurons_L is None:
            most = _largest(lambda s: costs.of(_with_neurons(counts, full, s, multiple)) <= budget)
            counts = _with_neurons(counts, full, most, multiple)
        else:
            counts = replace(counts, neurons_L=tuple(neurons_L))
        return counts, costs.of(counts)

    share = _largest(lambda share: costs.of(wished(share)) <= budget)
    fewer = 0.5 / max(full.heads_L)
    for tries in range(2 * max(full.heads_L) + 2):  # rounded up, heads may leave no room for neurons
        counts, cost = filled(max(share - tries * fewer, 0.0))
        if cost <= budget:
            return counts
    whole = dense_cost or costs.dense
    raise ValueError(
        f"the target of {budget / whole:.4g} cannot be reached: what is given, or else one head and {multiple} "
        f"neurons in each layer, still cost {cost / whole:.4g} of the dense size. Ask for more, give fewer "
        "widths yourself, or count another scope"
    )


def keep_best(scores_K: Tensor, count: int, kept_K: Tensor | None = None) -> Tensor:
    """Return which structures stay, bool ``[K]``: those with the highest scores, ties by the lower index.

    Args:
        scores_K: Larger for those to keep.
        count: How many to keep.
        kept_K: Which are there still; the others never come back. All by default.

    Example:
        >>> keep_best(torch.tensor([1.0, 3.0, 1.0]), 2)
        tensor([ True,  True, False])
    """
    order_K = torch.argsort(scores_K, descending=True, stable=True)
    if kept_K is not None:
        order_K = torch.cat([order_K[kept_K[order_K]], order_K[~kept_K[order_K]]])
    best_K = torch.zeros(len(scores_K), dtype=torch.bool, device=scores_K.device)
    best_K[order_K[:count]] = True
    return best_K


def choose_kept(
    scores: Sequence[LayerScores],
    costs: WidthCosts,
    budget: float,
    *,
    multiple: int,
    kept: Sequence[LayerScores] | None = None,
    embedding_rank: int | None = None,
    per_cost: bool = True,
) -> list[LayerScores]:
    """Return which heads and neurons stay, all layers competing: the worthiest first, until nothing more fits.

    Neurons compete in blocks: multiples of a layer's neurons in the order of their scores. Every layer keeps a head
    and a block. A kind of a layer whose next one does not fit stops there, others go on.

    Args:
        scores: Of each layer.
        costs: What things cost.
        budget: What they may cost together.
        multiple: Neurons of a layer are a multiple of this.
        kept: Which are there still (nonzero); the others never come back. All by default.
        embedding_rank: Rank that the word embeddings have.
        per_cost: Whether worth is score per cost, or a score as it is (of a block: its mean).

    Returns:
        1 for what stays and 0 for the rest, in the place of scores.

    Raises:
        ValueError: If one head and one block in each layer cost more than the budget.

    Example:
        >>> scores = [LayerScores(torch.tensor([9.0, 1.0]), torch.tensor([1.0, 5.0, 6.0, 2.0]))]
        >>> costs = WidthCosts((LayerCost(2, 4, 10.0, 5.0),), fixed=0.0)
        >>> choose_kept(scores, costs, 25.0, multiple=2)
        [LayerScores(heads_G=tensor([1., 0.]), neurons_F=tensor([0., 1., 1., 0.]))]
    """
    masks, queue = [], []
    for index, layer in enumerate(scores):
        masks.append(LayerScores(torch.zeros_like(layer.heads_G), torch.zeros_like(layer.neurons_F)))
        there = None if kept is None else kept[index]
        for units in _units(index, layer, there, costs.layers[index], multiple, per_cost):
            _admit(masks, units[0])
            queue += units[1:]
    spent = costs.of(_counted(masks, embedding_rank))
    if spent > budget:
        raise ValueError(
            f"the budget of {budget:,.0f} is below {spent:,.0f}, what one head and one block of neurons in each layer "
            "cost: ask for more, or lower the multiple"
        )
    full: set[tuple[int, bool]] = set()
    for unit in sorted(
        queue, key=lambda unit: -unit.worth
    ):  # stable: of equal worth the lower layer comes first
        if (unit.layer, unit.is_head) in full:
            continue
        if spent + unit.cost <= budget:
            spent += unit.cost
            _admit(masks, unit)
        else:
            full.add((unit.layer, unit.is_head))
    return masks


@dataclass(frozen=True)
class _Unit:
    """A head, or a block of neurons."""

    layer: int
    is_head: bool
    members: Tensor
    worth: float
    cost: float


def _units(
    index: int, scores: LayerScores, kept: LayerScores | None, cost: LayerCost, multiple: int, per_cost: bool
) -> list[list[_Unit]]:
    """The heads of a layer, and the blocks of its neurons, the best first."""
    kinds = (
        (True, scores.heads_G, None if kept is None else kept.heads_G, 1, cost.per_head),
        (False, scores.neurons_F, None if kept is None else kept.neurons_F, multiple, cost.per_neuron),
    )
    found = []
    for is_head, scores_K, kept_K, size, price in kinds:
        order_K = torch.argsort(scores_K, descending=True, stable=True)
        if kept_K is not None:
            order_K = order_K[kept_K[order_K].to(order_K.device) > 0]
        units = []
        for members in order_K.split(size):
            worth = float(scores_K[members].mean()) / (price if per_cost else 1.0)
            units.append(_Unit(index, is_head, members, worth, len(members) * price))
        found.append(units)
    return found


def _admit(masks: Sequence[LayerScores], unit: _Unit) -> None:
    mask = masks[unit.layer]
    (mask.heads_G if unit.is_head else mask.neurons_F)[unit.members] = 1.0


def _counted(masks: Sequence[LayerScores], embedding_rank: int | None) -> Counts:
    heads, neurons = (
        [int(mask.heads_G.sum()) for mask in masks],
        [int(mask.neurons_F.sum()) for mask in masks],
    )
    return Counts(tuple(heads), tuple(neurons), embedding_rank)


def _rank(costs: WidthCosts, share: float, multiple: int) -> int | None:
    """Rank of the word embeddings for a share; None where two factors are no smaller than the whole."""
    if not costs.vocabulary:
        return None
    rank = min(max(round(share * costs.hidden_size / multiple), 1) * multiple, costs.hidden_size)
    return rank if rank * costs.per_rank < costs.vocabulary else None


def _with_neurons(counts: Counts, full: Counts, share: float, multiple: int) -> Counts:
    neurons = tuple(_down(share * count, multiple, count) for count in full.neurons_L)
    return replace(counts, neurons_L=neurons)


def _down(wish: float, multiple: int, full: int) -> int:
    """The largest multiple within a wish, at least one; everything where that is wished."""
    return full if wish >= full else min(max(int(wish + 1e-6) // multiple, 1) * multiple, full)


def _largest(fits: Callable[[float], bool]) -> float:
    """The largest share in [0, 1] that fits, to within a millionth of a millionth."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
