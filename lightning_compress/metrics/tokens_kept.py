"""The share of tokens that is left at each layer, over a data set.

What the same counts cost is :func:`lightning_compress.nn.kept_flops.count_kept_flops`.

Shape legend: B sequences, L layers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["TokensKept"]


class TokensKept(Metric):
    """Share of the tokens that enter the attention of each layer, in [0, 1].

    ``sum(kept) / sum(length)`` over all sequences, updates and processes: a ratio of totals, so that long texts weigh
    as much as they cost. Totals are exact integers.

    Args:
        num_layers: Layers of the encoder.

    Raises:
        ValueError: If ``num_layers`` is below 1.

    Example:
        >>> metric = TokensKept(num_layers=2)
        >>> metric.update(kept_BL=torch.tensor([[8, 2], [2, 2]]), lengths_B=torch.tensor([8, 2]))
        >>> metric.compute()
        tensor([1.0000, 0.4000])
    """

    is_differentiable: ClassVar[bool] = False
    higher_is_better: ClassVar[bool] = False
    full_state_update: ClassVar[bool] = False
    plot_lower_bound: ClassVar[float] = 0.0
    plot_upper_bound: ClassVar[float] = 1.0

    kept_L: Tensor
    total: Tensor

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.num_layers = num_layers
        self.add_state("kept_L", default=torch.zeros(num_layers, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, kept_BL: Tensor, lengths_B: Tensor) -> None:
        """Add some sequences.

        Args:
            kept_BL: Tokens that entered the attention of each layer, whole numbers.
            lengths_B: Tokens of each sequence before the first layer, padding not included, at least 1.

        Raises:
            ValueError: If shapes do not fit, or a count is not a whole number from 0 to the length.
        """
        if lengths_B.dim() != 1 or tuple(kept_BL.shape) != (lengths_B.shape[0], self.num_layers):
            raise ValueError(
                f"kept_BL must be [B, {self.num_layers}] (sequences, layers) and lengths_B [B]; "
                f"got {list(kept_BL.shape)} and {list(lengths_B.shape)}"
            )
        kept_BL, lengths_B = _whole("kept_BL", kept_BL), _whole("lengths_B", lengths_B)
        if bool((lengths_B < 1).any()):
            raise ValueError(f"lengths_B must be at least 1, got {int(lengths_B.min())}")
        if bool(((kept_BL < 0) | (kept_BL > lengths_B[:, None])).any()):
            raise ValueError(
                "kept_BL must lie between 0 and the length of its sequence; "
                f"got {kept_BL.tolist()} for lengths {lengths_B.tolist()}"
            )
        self.kept_L += kept_BL.sum(dim=0)
        self.total += lengths_B.sum()

    def compute(self) -> Tensor:
        """Return the share that each layer keeps, ``[L]``; not a number before the first update.

        Of a single layer torchmetrics makes a scalar.
        """
        return self.kept_L / self.total


def _whole(name: str, counts: Tensor) -> Tensor:
    whole = counts.long()
    if counts.is_floating_point() and not torch.equal(whole.to(counts.dtype), counts):
        raise ValueError(f"{name} must hold whole numbers of tokens, got {counts.tolist()}")
    return whole
