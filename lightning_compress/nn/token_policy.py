"""What policies of token dropping have in common: the layers they decide at, and the tokens nobody may drop.

The next chapters are :mod:`lightning_compress.nn.contribution_token_dropping` and
:mod:`lightning_compress.nn.bottleneck_token_dropping`.

Shape legend: B batch, T padded length, N packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_compress.nn.segments import Segments

__all__ = ["TokenPolicy", "at_least_float"]

_HALF = (torch.bfloat16, torch.float16)


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

    exact_tensors: ClassVar[tuple[str, ...]] = ()
    """Parameters and buffers that no cast takes below float32: small steps would round to nothing there."""
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

    def with_protected(self, keep_N: Tensor, segments: Segments) -> Tensor:
        """Add the protected rows to those that stay, in place; the first of each sequence is one of them."""
        if segments.protected_N is not None:
            keep_N |= segments.protected_N
        keep_N[segments.firsts_B] = True
        return keep_N

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the policy, but nothing of :attr:`exact_tensors` below float32."""
        exact = {name: getattr(self, name).detach() for name in self.exact_tensors}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            moved = getattr(self, name)
            if moved.dtype in _HALF:
                moved.data = tensor.to(moved.device)
        return self


def at_least_float(values: Tensor) -> Tensor:
    """Return half-precision values as float32, and all others as they are."""
    return values.float() if values.dtype in _HALF else values
