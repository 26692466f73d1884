"""The bias of an engine: read from its layer at every call, since training and loads change it.

The next chapter is :mod:`lightning_compress.runtime.fast_linear`.

Shape legend: N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["LiveBias"]


class LiveBias:
    """The biases of one or several layers in a row, in any dtype, as they are now.

    Nothing is kept from call to call: fused optimizers and writes to ``.data`` change a tensor without counting it.

    Args:
        layers: Layers with an attribute ``bias``; for none of them, or for all, it is None.

    Raises:
        ValueError: If some are None and others are not.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> live = LiveBias([layer])
        >>> layer.bias = nn.Parameter(torch.ones(2))
        >>> live(torch.bfloat16)
        tensor([1., 1.], dtype=torch.bfloat16)
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        # not the layers themselves, which hold the engine that holds this
        self._owners: tuple[Mapping[str, Tensor | None], ...] = tuple([part._parameters for part in layers])
        if len({owner["bias"] is None for owner in self._owners}) > 1:
            raise ValueError("some of the layers have a bias and others have none: they cannot be joined")

    @classmethod
    def of(cls, bias: Tensor | LiveBias | None) -> LiveBias:
        """Return the live form of a tensor, whose changes in place are seen; what is live already stays."""
        if isinstance(bias, LiveBias):
            return bias
        live = cls.__new__(cls)
        live._owners = ({"bias": bias},)
        return live

    def __call__(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias in a dtype, ``[N]``; None if there is none."""
        bias_N = self._owners[0]["bias"]
        if bias_N is None:
            return None
        if len(self._owners) > 1:
            bias_N = torch.cat([owner["bias"] for owner in self._owners])  # type: ignore[misc]
        if bias_N.dtype != dtype:
            bias_N = bias_N.to(dtype)
        return bias_N.detach() if bias_N.requires_grad and torch.is_grad_enabled() else bias_N
