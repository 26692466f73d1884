"""``compact`` as one Triton kernel: scan and gather in one pass over the rows. Needs the extra ``triton``.

A program owns some consecutive rows. It counts the kept rows before its own by reading all earlier decisions, a byte
each and from the cache, so that no program waits for another and results do not depend on the order in which they
run. Then it copies its kept rows to their places, tile by tile. Rows that leave are never read.

Shape legend: N rows, M rows that stay, B sequences, D hidden size; R rows of a tile, C columns, S decisions scanned
at once, Q offsets at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["compact", "compact_kernel", "launch", "tile_sizes"]

TILE_ROWS = 8
NUM_SCANNED = 1024
NUM_OFFSETS = 64
MAX_COLUMNS = 256  # 512 spills on sm_90
MAX_PROGRAMS = 1024
"""The decisions read for counting are N * programs / 2 bytes; this keeps them below the bytes of the rows."""


def compact(hidden_ND: Tensor, keep_N: Tensor, cu_seqlens_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Do what :func:`lightning_compress.ops.compact.reference.compact` does; arguments are not checked.

    The host reads the number of rows that stay, which waits for the device once.
    """
    num_rows, num_offsets = keep_N.shape[0], cu_seqlens_B1.shape[0]
    out_ND = torch.empty(hidden_ND.shape, dtype=hidden_ND.dtype, device=hidden_ND.device)
    index_N = torch.empty(num_rows, dtype=torch.int64, device=keep_N.device)
    # the last one is the number of rows that stay
    moved_B2 = torch.empty(num_offsets + 1, dtype=cu_seqlens_B1.dtype, device=cu_seqlens_B1.device)
    with torch.cuda.device_of(hidden_ND):  # Triton launches on the current device
        launch(hidden_ND, keep_N, cu_seqlens_B1, out_ND, index_N, moved_B2)
    num_kept = int(moved_B2[-1])
    return out_ND[:num_kept], moved_B2[:-1], index_N[:num_kept]


def launch(
    hidden_ND: Tensor,
    keep_N: Tensor,
    cu_seqlens_B1: Tensor,
    out_ND: Tensor,
    index_N: Tensor,
    moved_B2: Tensor,
) -> None:
    """Run the kernel into given outputs; of ``out_ND`` and ``index_N`` it writes the first M rows only.

    Args:
        hidden_ND: Rows.
        keep_N: True for rows that stay.
        cu_seqlens_B1: Where each sequence starts, and N at the end.
        out_ND: Contiguous, in the dtype of the rows.
        index_N: Contiguous, int64.
        moved_B2: Contiguous, in the dtype of the offsets: the new offsets, then M.
    """
    num_rows, width = hidden_ND.shape
    if hidden_ND.stride(1) != 1:
        hidden_ND = hidden_ND.contiguous()
    tiles = triton.cdiv(triton.cdiv(num_rows, TILE_ROWS), MAX_PROGRAMS)
    rows_per_program = max(tiles, 1) * TILE_ROWS
    compact_kernel[(max(triton.cdiv(num_rows, rows_per_program), 1),)](
        hidden_ND,
        keep_N.contiguous().view(torch.uint8),
        cu_seqlens_B1.contiguous(),
        out_ND,
        index_N,
        moved_B2,
        num_rows,
        cu_seqlens_B1.shape[0],
        rows_per_program,
        hidden_ND.stride(0),
        **tile_sizes(width),
    )


def tile_sizes(width: int) -> dict[str, Any]:
    """Return the constants that the kernel is compiled with for rows of this width.

    Example:
        >>> tile_sizes(384)["C"]
        256
    """
    columns = min(triton.next_power_of_2(max(width, 1)), MAX_COLUMNS)
    return {"WIDTH": width, "R": TILE_ROWS, "C": columns, "S": NUM_SCANNED, "Q": NUM_OFFSETS}


@triton.jit(do_not_specialize=["num_rows", "num_offsets", "rows_per_program"])
def compact_kernel(
    hidden_ptr,
    keep_ptr,
    cu_seqlens_ptr,
    out_ptr,
    index_ptr,
    moved_ptr,
    num_rows,
    num_offsets,
    rows_per_program,
    row_stride,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
):
    """Scan and gather; see the module. Pointers in the order of :func:`launch`, sizes in elements."""
    first = tl.multiple_of(tl.program_id(0) * rows_per_program, R)  # so that decisions load eight at a time
    last = tl.minimum(first + rows_per_program, num_rows)
    num_before = _count_kept(keep_ptr, first, S)
    for start in range(first, last, R):
        row_R = start + tl.arange(0, R)
        keep_R = tl.load(keep_ptr + row_R, mask=row_R < last, other=0).to(tl.int32)
        place_R = num_before + tl.cumsum(keep_R, axis=0) - keep_R
        stays_R = keep_R != 0
        tl.store(index_ptr + place_R, row_R.to(tl.int64), mask=stays_R)
        for begin in range(0, WIDTH, C):
            column_C = begin + tl.arange(0, C)
            mask_RC = stays_R[:, None] & (column_C < WIDTH)[None, :]
            source_RC = row_R.to(tl.int64)[:, None] * row_stride + column_C[None, :]
            target_RC = place_R.to(tl.int64)[:, None] * WIDTH + column_C[None, :]
            tl.store(out_ptr + target_RC, tl.load(hidden_ptr + source_RC, mask=mask_RC), mask=mask_RC)
        for begin in range(0, num_offsets, Q):
            at_Q = begin + tl.arange(0, Q)
            old_Q = tl.load(cu_seqlens_ptr + at_Q, mask=at_Q < num_offsets, other=-1)
            below_RQ = tl.where(row_R[:, None] < old_Q[None, :], keep_R[:, None], 0)
            inside_Q = (old_Q >= start) & (old_Q < tl.minimum(start + R, last))
            tl.store(moved_ptr + at_Q, num_before + tl.sum(below_RQ, axis=0), mask=inside_Q)
        num_before += tl.sum(keep_R, axis=0)
    if last == num_rows:  # offsets at the very end, and the total
        for begin in range(0, num_offsets, Q):
            at_Q = begin + tl.arange(0, Q)
            old_Q = tl.load(cu_seqlens_ptr + at_Q, mask=at_Q < num_offsets, other=-1)
            tl.store(moved_ptr + at_Q, num_before + tl.zeros_like(at_Q), mask=old_Q == num_rows)
        tl.store(moved_ptr + num_offsets, num_before)


@triton.jit
def _count_kept(keep_ptr, end, S: tl.constexpr):
    """Number of rows kept before row ``end``."""
    counts_S = tl.zeros((S,), dtype=tl.int32)
    for start in range(0, end, S):
        at_S = start + tl.arange(0, S)
        counts_S += tl.load(keep_ptr + at_S, mask=at_S < end, other=0).to(tl.int32)
    return tl.sum(counts_S, axis=0)
