"""The bias of an engine: cast once, and anew when a training step or a load has changed it.

The next chapter is :mod:`lightning_compress.runtime.fast_linear`.

Shape legend: N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LiveBias"]


class LiveBias:
    """The biases of one or several layers in a row, in any dtype, as they are now.

    Changes in place are seen, as optimizers make them, and a bias that is another tensor is not.

    Args:
        parts: Biases, one layer's after the other's; none of them, or all, are None.

    Raises:
        ValueError: If some are None and others are not.

    Example:
        >>> bias_N = torch.zeros(2)
        >>> live = LiveBias([bias_N])
        >>> before = live(torch.float32)
        >>> _ = bias_N.add_(1)
        >>> live(torch.bfloat16)
        tensor([1., 1.], dtype=torch.bfloat16)
    """

    def __init__(self, parts: Sequence[Tensor | None]) -> None:
        # a detached tensor counts changes together with the one that it comes from
        self._parts = tuple([part.detach() for part in parts if part is not None])
        if self._parts and len(self._parts) != len(parts):
            raise ValueError("some of the layers have a bias and others have none: they cannot be joined")
        self._cache: tuple[tuple[int, ...], dict[torch.dtype, Tensor]] = ((), {})

    @classmethod
    def of(cls, bias: Tensor | LiveBias | None) -> LiveBias:
        """Return the live form of a bias; what is one already stays."""
        return bias if isinstance(bias, LiveBias) else cls([bias])

    @property
    def version(self) -> tuple[int, ...]:
        """Another one after each change."""
        return tuple([0 if part.is_inference() else part._version for part in self._parts])

    def __call__(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias in a dtype, ``[N]``; None if there is none."""
        if not self._parts:
            return None
        version = self.version
        seen, cast = self._cache
        if seen != version:
            cast = {}
            self._cache = (version, cast)  # in one assignment: other threads may be here too
        if dtype not in cast:
            cast[dtype] = torch.cat(self._parts).to(dtype)
        return cast[dtype]
