"""The FLOPs speed-up over a data set: the ratio of totals, not the mean of ratios.

The counts come from :func:`lightning_compress.nn.flops.count_flops`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Speedup"]


class Speedup(Metric):
    """How many times fewer FLOPs the compressed model spends than the dense one.

    ``sum(dense FLOPs) / sum(compressed FLOPs)`` over all updates and processes. Totals are exact integers.

    Example:
        >>> metric = Speedup()
        >>> metric.update(dense_flops=300.0, compressed_flops=100.0)
        >>> metric.update(dense_flops=100.0, compressed_flops=100.0)
        >>> metric.compute()
        tensor(2.)
    """

    is_differentiable: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = True
    full_state_update: ClassVar[bool] = False
    plot_lower_bound: ClassVar[float] = 0.0

    dense_flops: Tensor
    compressed_flops: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.long)  # exact up to 9e18 FLOPs, and available on every device
        self.add_state("dense_flops", default=zero.clone(), dist_reduce_fx="sum")
        self.add_state("compressed_flops", default=zero.clone(), dist_reduce_fx="sum")

    def update(self, dense_flops: float | Tensor, compressed_flops: float | Tensor) -> None:
        """Add the FLOPs that some examples cost, as numbers or as tensors of any shape, which are summed.

        Raises:
            ValueError: If a total is not a finite number of at least 1.
        """
        dense = _whole("dense_flops", dense_flops)
        compressed = _whole("compressed_flops", compressed_flops)
        self.dense_flops += dense
        self.compressed_flops += compressed

    def compute(self) -> Tensor:
        """Return the ratio of the totals, a scalar; not a number before the first update."""
        return self.dense_flops / self.compressed_flops


def _whole(name: str, flops: float | Tensor) -> int:
    total = float(flops.sum()) if isinstance(flops, Tensor) else float(flops)
    if not math.isfinite(total) or total < 1:
        raise ValueError(f"{name} must be a finite number of FLOPs, at least 1; got {total}")
    return round(total)
