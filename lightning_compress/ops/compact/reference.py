"""What ``compact`` means, in plain torch; also how it runs wherever there is no kernel.

The next chapter is :mod:`lightning_compress.ops.compact.triton_kernel`.

Shape legend: N rows, M rows that stay, B sequences, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compact"]


def compact(hidden_ND: Tensor, keep_N: Tensor, cu_seqlens_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keep some rows, and tell where each sequence then starts. Arguments are not checked.

    The offset of a sequence becomes the number of kept rows before it: in the ascending ``index_M``, the place
    at which the old offset would be inserted.

    Args:
        hidden_ND: Rows.
        keep_N: True for rows that stay.
        cu_seqlens_B1: Where each sequence starts, and N at the end; int32 or int64.

    Returns:
        The rows ``[M, D]``, the offsets ``[B + 1]`` in the dtype they came in, and which rows stayed ``[M]``.

    Example:
        >>> keep = torch.tensor([True, False, False, True])
        >>> compact(torch.eye(4), keep, torch.tensor([0, 2, 4]))[1:]
        (tensor([0, 1, 2]), tensor([0, 3]))
    """
    index_M = keep_N.nonzero().squeeze(1)
    moved_B1 = torch.searchsorted(
        index_M, cu_seqlens_B1.long().contiguous(), out_int32=cu_seqlens_B1.dtype == torch.int32
    )
    return hidden_ND.index_select(0, index_M), moved_B1, index_M
