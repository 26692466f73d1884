"""Numbers of rows that low-precision products on CPU have met before.

In bf16 and fp16, oneDNN generates code for each number of rows it meets, which can take longer than the product
itself. Packed batches meet a new number at every layer that drops tokens; rounded up, they soon meet only known ones.
The next chapter is
:mod:`lightning_compress.runtime.encoder`, which carries the spare rows along.

Shape legend: N rows, P rows with spare ones, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bucket_of", "with_spare_rows"]

_SMALLEST_STEP = 16
_STEPS_PER_DOUBLING = 16


def bucket_of(num_rows: int, like: Tensor) -> int:
    """Return how many rows to compute for ``num_rows``: equal in full precision and off the CPU, else rounded up.

    Up to 512 rows in steps of 16, then in 16 steps per doubling: at most 6 % more rows, 2 % on average.

    Args:
        num_rows: Rows there are.
        like: A tensor of the dtype and on the device in question; autocast is taken into account.

    Example:
        >>> low = torch.empty(0, dtype=torch.bfloat16)
        >>> [bucket_of(rows, low) for rows in (0, 1, 37, 512, 513, 1100)], bucket_of(37, low.float())
        ([0, 16, 48, 512, 544, 1152], 37)
    """
    if like.device.type != "cpu" or _compute_dtype(like) not in (torch.bfloat16, torch.float16):
        return num_rows
    step = max(_SMALLEST_STEP, (1 << max(num_rows - 1, 0).bit_length()) // (2 * _STEPS_PER_DOUBLING))
    return -(-num_rows // step) * step


def with_spare_rows(rows_ND: Tensor) -> Tensor:
    """Return the rows and, after them, zeros up to the bucket, ``[P, D]``; the rows themselves if they fill it.

    Example:
        >>> with_spare_rows(torch.ones(3, 2, dtype=torch.bfloat16)).shape
        torch.Size([16, 2])
    """
    spare = bucket_of(rows_ND.shape[0], rows_ND) - rows_ND.shape[0]
    return F.pad(rows_ND, (0, 0, 0, spare)) if spare else rows_ND


def _compute_dtype(like: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else like.dtype
