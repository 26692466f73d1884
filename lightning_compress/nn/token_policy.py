"""What policies of token dropping have in common: the layers they decide at, and the tokens nobody may drop.

The next chapter is :mod:`lightning_compress.nn.bottleneck_token_dropping`.

Shape legend: B batch, T padded length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["TokenPolicy"]


class TokenPolicy(nn.Module):
    """Base of policies: chosen layers, protected tokens, and ``scale``, the dial that is turned without training.

    Args:
        layers: Indices of the layers before which tokens may leave, from 0, ascending.
        protect_first: How many tokens at the start never leave, at least 1.

    Example:
        >>> policy = TokenPolicy([0, 2])
        >>> policy.protected(torch.tensor([[True, True], [False, True]])).tolist()
        [[True, False], [False, True]]
    """

    scale: Tensor

    def __init__(self, layers: Sequence[int], protect_first: int = 1) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.protect_first = protect_first
        self.guarded_BT: Tensor | None = None
        """Tokens protected for what they are, in the running pass."""
        self.register_buffer("scale", torch.ones(()))

    def protected(self, real_BT: Tensor) -> Tensor:
        """Return the first tokens of each sequence, and tokens protected for what they are."""
        protected_BT = real_BT & (real_BT.cumsum(dim=1) <= self.protect_first)
        return protected_BT if self.guarded_BT is None else protected_BT | (self.guarded_BT & real_BT)
