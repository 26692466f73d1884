"""What BlockQuantization minimises beside the task loss: nothing. What is rounded learns from the task itself.

The next chapter is :mod:`lightning_compress.callbacks.block_quantization`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_compress.losses.base import LossMixin

__all__ = ["BlockQuantizationLossMixin", "terms"]


def terms(handle: Any) -> dict[str, Tensor]:
    """Return no terms, whatever the handle.

    Example:
        >>> terms(None)
        {}
    """
    return {}


class BlockQuantizationLossMixin(LossMixin):
    """For modules with an objective of their own: BlockQuantization has no term to place in it."""

    def rounding_loss(self) -> Tensor | float:
        """Return 0: rounding is learned through the task's own loss."""
        return sum(self.compression_terms("block_quantization").values(), start=0.0)
