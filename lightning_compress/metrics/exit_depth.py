"""How many layers examples run that may leave early, over a data set.

What they cost is :func:`lightning_compress.nn.kept_flops.count_kept_flops`.

Shape legend: B examples, L layers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ExitDepth"]


class ExitDepth(Metric):
    """Mean number of layers that an example runs, from 1 to L; all examples of all updates and processes count alike.

    Models with exits put the numbers into their output, as ``exit_depth``. Counts are exact integers.

    Args:
        num_layers: Layers of the encoder.

    Raises:
        ValueError: If ``num_layers`` is below 1.

    Paper: COST-EFF §4 of the specification; the expected speed-up it reports is ``num_layers / metric``.
    Departs from the paper: the official code adds the batch size for a last batch that is smaller.

    Example:
        >>> metric = ExitDepth(num_layers=4)
        >>> metric.update(torch.tensor([1, 4, 4]))
        >>> metric.compute(), metric.shares_L
        (tensor(3.), tensor([0.3333, 0.0000, 0.0000, 0.6667]))
    """

    is_differentiable: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = False
    full_state_update: ClassVar[bool] = False
    plot_lower_bound: ClassVar[float] = 1.0

    counts_L: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.num_layers = num_layers
        self.add_state("counts_L", default=torch.zeros(num_layers, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, depth_B: Tensor) -> None:
        """Add some examples.

        Args:
            depth_B: How many layers each ran, integers from 1 to the number of layers.

        Raises:
            TypeError: If the numbers are no integers.
            ValueError: If there is more than one dimension, or a number is out of range.
        """
        if depth_B.is_floating_point() or depth_B.dtype == torch.bool:
            raise TypeError(
                f"depth_B holds {depth_B.dtype}: give whole numbers of layers, such as outputs.exit_depth"
            )
        if depth_B.dim() != 1:
            raise ValueError(f"depth_B must be [B], one number for each example; got {list(depth_B.shape)}")
        if depth_B.numel() and not 1 <= int(depth_B.min()) <= int(depth_B.max()) <= self.num_layers:
            raise ValueError(f"depth_B must lie between 1 and {self.num_layers}, got {depth_B.tolist()}")
        self.counts_L += torch.bincount(depth_B.to(self.counts_L.device) - 1, minlength=self.num_layers)

    def compute(self) -> Tensor:
        """Return the mean number of layers; not a number before the first example."""
        layers_L = torch.arange(1, self.num_layers + 1, device=self.counts_L.device)
        return (self.counts_L * layers_L).sum() / self.counts_L.sum()

    @property
    def shares_L(self) -> Tensor:
        """Share of the examples that left after each layer, on this process; the last is those that ran all."""
        return self.counts_L / self.counts_L.sum()
