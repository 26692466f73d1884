"""Attention over packed rows: each row sees the rows of its own sequence, and there is no padding to mask.

The next chapter is :mod:`lightning_compress.runtime.block`, which calls it once per layer.

Shape legend: B sequences, N query rows, M key rows, Q and K longest query and key sequence, H heads, E head width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.nn.quantized_attention import BlockAttention
from lightning_compress.nn.segments import Segments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

__all__ = ["packed_attention", "padded_attention"]

_LANES, _LONG_REST = 16, 6


def packed_attention(
    query_NHE: Tensor,
    key_MHE: Tensor,
    value_MHE: Tensor,
    cu_query: Segments,
    cu_key: Segments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(QK^T) V within each sequence, ``[N, H, E]``; differentiable.

    Which kernel runs depends on shapes and device alone, never on values:

    * a sequence's only key gets all the attention, so with one key row each the values are the answer (not where
      queries want gradients: zeros, but DDP waits for them);
    * one sequence, or all equally long: a single call over a view ``[B, H, T, E]``;
    * otherwise, on CPU: one call per sequence. Measured (one thread, 12 heads of 32, 8 and 32 sequences, 16 to 256
      tokens, fp32 and bf16) against padding to the longest with a mask, which takes 1.3 to 2.8 times as long in
      fp32, and products with a softmax between them, which win up to 35 % in fp32 below 64 tokens (2 % of a layer)
      and lose 1.3 to 2 times in bf16;
    * otherwise, on CUDA: variable-length flash attention in half precision without dropout, else padded.

    Args:
        query_NHE: Query rows.
        key_MHE: Key rows.
        value_MHE: Value rows.
        cu_query: Which sequence each query row belongs to.
        cu_key: Which sequence each key row belongs to; the same sequences.
        scale: Factor of the products; None is ``E ** -0.5``.
        dropout: Probability with which attention weights are dropped, in [0, 1).

    Example:
        >>> segments = Segments.of(torch.tensor([[True, False], [True, True]]))
        >>> rows = torch.ones(3, 1, 2)
        >>> packed_attention(rows, rows, rows, segments, segments).shape
        torch.Size([3, 1, 2])
    """
    num_sequences = cu_key.num_sequences
    if cu_key.num_rows == num_sequences and dropout == 0.0 and not query_NHE.requires_grad:
        return (
            value_MHE
            if cu_query.num_rows == num_sequences
            else value_MHE.index_select(0, cu_query.sequence_N)
        )
    lengths_q = _lengths(cu_query)
    lengths_k = lengths_q if cu_key is cu_query else _lengths(cu_key)
    if len(set(lengths_q)) < 2 and len(set(lengths_k)) < 2:
        size_q, size_k = (num_sequences, sum(lengths_q[:1])), (num_sequences, sum(lengths_k[:1]))
        attended_BHQE = _attend(
            query_NHE.unflatten(0, size_q).transpose(1, 2),
            key_MHE.unflatten(0, size_k).transpose(1, 2),
            value_MHE.unflatten(0, size_k).transpose(1, 2),
            scale,
            dropout,
        )
        return attended_BHQE.transpose(1, 2).flatten(0, 1)
    if not query_NHE.is_cuda:
        return _one_call_each(query_NHE, key_MHE, value_MHE, lengths_q, lengths_k, scale, dropout)
    if (
        dropout == 0.0
        and query_NHE.dtype in (torch.float16, torch.bfloat16)
        and _has_varlen(query_NHE.device)
    ):
        return _varlen(query_NHE, key_MHE, value_MHE, cu_query, cu_key, scale)
    return padded_attention(query_NHE, key_MHE, value_MHE, cu_query, cu_key, scale=scale, dropout=dropout)


def padded_attention(
    query_NHE: Tensor,
    key_MHE: Tensor,
    value_MHE: Tensor,
    cu_query: Segments,
    cu_key: Segments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    attend: BlockAttention | None = None,
) -> Tensor:
    """Return what :func:`packed_attention` returns, by padding to the longest sequence and masking.

    For devices on which one call per sequence costs more than the padding: few launches, each over everything. And
    for attention in integers, which ``attend`` computes.
    """
    place_M, real_BK = _places(cu_key)
    place_N, real_BQ = (place_M, real_BK) if cu_key is cu_query else _places(cu_query)
    padded = (
        _pad(query_NHE, place_N, real_BQ),
        _pad(key_MHE, place_M, real_BK),
        _pad(value_MHE, place_M, real_BK),
    )
    seen_B11K = real_BK[:, None, None, :]
    if attend is not None:
        attended_BHQE, _ = attend(*padded, seen_B11K, scale, dropout)
    else:
        attended_BHQE = F.scaled_dot_product_attention(
            *padded, attn_mask=seen_B11K, dropout_p=dropout, scale=scale
        )
    return attended_BHQE.transpose(1, 2).flatten(0, 1).index_select(0, place_N)


def _lengths(segments: Segments) -> list[int]:
    offsets = segments.offsets
    return [end - start for start, end in pairwise(offsets)]


def _one_call_each(
    query_NHE: Tensor,
    key_MHE: Tensor,
    value_MHE: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    scale: float | None,
    dropout: float,
) -> Tensor:
    query_1HNE, key_1HME, value_1HME = (
        rows.transpose(0, 1).unsqueeze(0) for rows in (query_NHE, key_MHE, value_MHE)
    )
    parts = zip(
        query_1HNE.split(lengths_q, 2),
        key_1HME.split(lengths_k, 2),
        value_1HME.split(lengths_k, 2),
        strict=True,
    )
    attended = [_attend(*part, scale, dropout) for part in parts]
    return torch.cat([part.transpose(1, 2) for part in attended], dim=1).squeeze(0)


def _attend(
    query_BHQE: Tensor, key_BHKE: Tensor, value_BHKE: Tensor, scale: float | None, dropout: float
) -> Tensor:
    """Return attention without padding; on CPU with as many keys as the kernel's vectors like.

    The CPU kernel takes exponentials of 16 keys at once and of the rest one by one. From a rest of six on, it is
    faster to fill the keys up and hide the filling: by a third at 31 and at 127 keys in fp32, by nearly half in
    bf16 (AVX-512).
    """
    queries, keys = query_BHQE.shape[2], key_BHKE.shape[2]
    if keys % _LANES < _LONG_REST or min(queries, keys) < _LANES or dropout > 0.0 or query_BHQE.is_cuda:
        return F.scaled_dot_product_attention(
            query_BHQE, key_BHKE, value_BHKE, dropout_p=dropout, scale=scale
        )
    filling = (0, 0, 0, -keys % _LANES)
    bias_K = F.pad(query_BHQE.new_zeros(keys), filling[2:], value=-torch.inf)
    return F.scaled_dot_product_attention(
        query_BHQE,
        F.pad(key_BHKE, filling),
        F.pad(value_BHKE, filling),
        bias_K.expand(1, 1, 1, -1),
        scale=scale,
    )


def _has_varlen(device: torch.device) -> bool:
    return varlen_attn is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(
    query_NHE: Tensor,
    key_MHE: Tensor,
    value_MHE: Tensor,
    cu_query: Segments,
    cu_key: Segments,
    scale: float | None,
) -> Tensor:
    assert varlen_attn is not None
    starts = (cu_query.cu_seqlens_B1.int(), cu_key.cu_seqlens_B1.int())
    longest = (max(_lengths(cu_query)), max(_lengths(cu_key)))
    scaling: dict[str, Any] = (
        {} if scale is None else {"scale": scale}
    )  # not an argument of its first versions
    attended = varlen_attn(query_NHE, key_MHE, value_MHE, *starts, *longest, **scaling)
    assert isinstance(attended, Tensor)
    return attended


def _places(segments: Segments) -> tuple[Tensor, Tensor]:
    """Return the place of each row in the flattened padded batch, and which places hold a row ``[B, T]``."""
    longest = max(_lengths(segments))
    positions_T = torch.arange(longest, device=segments.cu_seqlens_B1.device)
    real_BT = positions_T < segments.lengths_B[:, None]
    rows_N = torch.arange(segments.num_rows, device=positions_T.device)
    return rows_N + segments.sequence_N * longest - segments.firsts_B[segments.sequence_N], real_BT


def _pad(rows_NHE: Tensor, place_N: Tensor, real_BT: Tensor) -> Tensor:
    """Return rows at their places in ``[B, H, T, E]``, with zeros elsewhere."""
    empty = rows_NHE.new_zeros((real_BT.numel(), *rows_NHE.shape[1:]))
    return empty.index_copy(0, place_N, rows_NHE).unflatten(0, real_BT.shape).transpose(1, 2)
