"""What WidthSlimming minimises beside the task loss under the L0 criterion: a Lagrangian of the expected size.

The Taylor criteria add nothing to the loss. The next chapter is :mod:`lightning_compress.callbacks.width_slimming`.

Shape legend: G heads and F neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_compress.losses.base import LossMixin
from lightning_compress.nn.hard_concrete import open_probability
from lightning_compress.nn.width_costs import LayerCost

__all__ = ["STIFFNESS", "WidthSlimmingLossMixin", "expected_cost", "lagrangian", "terms"]

STIFFNESS = 50.0
"""Weight of the squared gap beside the learned multipliers."""


def expected_cost(
    layers: Sequence[LayerCost], heads: Sequence[Tensor | None], neurons: Sequence[Tensor | None]
) -> Tensor | float:
    """Return the expected cost of all heads and neurons, differentiable in the locations of their gates.

    Args:
        layers: What each layer's structures cost.
        heads: Location of each head's gate, ``[G]`` for each layer; None where heads all stay.
        neurons: The same of neurons, ``[F]``.

    Paper: CoFi (ACL 2022), specification §8: the L0 norm of hard concrete gates in expectation.

    Example:
        >>> import torch
        >>> always = torch.full((2,), 50.0)
        >>> float(expected_cost([LayerCost(2, 4, 10.0, 1.0)], [always], [None]))
        24.0
    """
    total: Tensor | float = 0.0
    for layer, heads_G, neurons_F in zip(layers, heads, neurons, strict=True):
        kinds = ((heads_G, layer.num_heads, layer.per_head), (neurons_F, layer.num_neurons, layer.per_neuron))
        for location_K, count, cost in kinds:
            total = total + cost * (count if location_K is None else open_probability(location_K).sum())
    return total


def lagrangian(gap: Tensor, multipliers: Tensor, stiffness: float = STIFFNESS) -> Tensor:
    """Return ``l1 gap + (l2 + stiffness) gap^2``; descent in everything else, ascent in the two multipliers.

    Gradients of the multipliers come back with the opposite sign, so that the optimizer that lowers the loss raises
    them while the gap is open.

    Args:
        gap: Expected size over dense size, minus where it should be now.
        multipliers: ``l1`` and ``l2``, shape ``[2]``.
        stiffness: Weight that the square has from the start.

    Paper: CoFi (ACL 2022), specification §8.
    Departs from the paper: there the stiffness is 0. Multipliers alone sum up the gap, answer late in short runs, and
    overshoot.

    Example:
        >>> import torch
        >>> l = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> loss = lagrangian(torch.tensor(0.5), l, stiffness=10.0)
        >>> loss.backward()
        >>> loss.item(), l.grad
        (3.5, tensor([-0.5000, -0.2500]))
    """
    ascending = 2.0 * multipliers.detach() - multipliers
    return ascending[0] * gap + (ascending[1] + stiffness) * gap.square()


def terms(handle: Any) -> dict[str, Tensor]:
    """Return the Lagrangian of a prepared WidthSlimming handle; none outside the search, or by Taylor criteria."""
    gates = handle.gates
    if handle.phase != "slimming" or gates.multipliers is None:
        return {}
    heads, neurons = ([gate.log_alpha_K for gate in kind] for kind in (gates.heads, gates.neurons))
    ratio = (handle.other_cost + expected_cost(handle.costs.layers, heads, neurons)) / handle.costs.dense
    return {"size": lagrangian(ratio - handle.scheduled_ratio, gates.multipliers)}


class WidthSlimmingLossMixin(LossMixin):
    """For modules with an objective of their own that want to place WidthSlimming's term themselves."""

    def width_loss(self) -> Tensor | float:
        """Return the Lagrangian of the size for this step; 0 by Taylor criteria and outside the search."""
        return sum(self.compression_terms("width_slimming").values(), start=0.0)
