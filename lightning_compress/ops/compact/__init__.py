"""``lightning_compress::compact``: some rows of a packed batch stay, and the offsets follow.

Dropping a token and letting an example leave early are both this. Schema, shapes and gradient are here; the next
chapter is :mod:`lightning_compress.ops.compact.reference`, which is the meaning.

Shape legend: N rows, M rows that stay, B sequences, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lightning_compress.ops.compact import reference

__all__ = ["compact"]

_Compacted = tuple[Tensor, Tensor, Tensor]


def compact(hidden_ND: Tensor, keep_N: Tensor, cu_seqlens_B1: Tensor) -> _Compacted:
    """Keep some rows of a packed batch, in their order, and rebuild the offsets.

    A sequence of which no row stays has length zero from then on: its two offsets are equal. The gradient of the
    rows is scattered back, zero where a row left. On CUDA the number of rows that stay is read by the host, which
    waits for the device once, and the storage of the result has room for N rows.

    Args:
        hidden_ND: Rows, of any dtype and strides.
        keep_N: True for rows that stay; bool.
        cu_seqlens_B1: Where each sequence starts, and N at the end: ascending, int32 or int64. Its values are
            not checked.

    Returns:
        ``hidden_MD``, the rows that stay; ``cu_seqlens_B1``, their offsets in the dtype given; ``index_M``, which
        rows they were, int64 and ascending. None of them shares memory with an argument.

    Raises:
        TypeError: If ``keep_N`` is not bool, or the offsets are neither int32 nor int64.
        ValueError: If shapes do not fit together, or the tensors are on different devices.

    Example:
        >>> hidden = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> keep = torch.tensor([True, False, True, True])
        >>> kept, offsets, index = compact(hidden, keep, torch.tensor([0, 2, 4]))
        >>> kept.flatten().tolist(), offsets.tolist(), index.tolist()
        ([0.0, 2.0, 3.0], [0, 1, 3], [0, 2, 3])
    """
    _check(hidden_ND, keep_N, cu_seqlens_B1)
    return torch.ops.lightning_compress.compact.default(hidden_ND, keep_N, cu_seqlens_B1)


def _check(hidden_ND: Tensor, keep_N: Tensor, cu_seqlens_B1: Tensor) -> None:
    if keep_N.dtype != torch.bool:
        raise TypeError(f"keep_N is {keep_N.dtype}: give bool, such as scores > threshold")
    if cu_seqlens_B1.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens_B1 is {cu_seqlens_B1.dtype}: give int32 or int64")
    if (hidden_ND.dim(), keep_N.dim(), cu_seqlens_B1.dim()) != (2, 1, 1):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden_ND, keep_N, cu_seqlens_B1))
        raise ValueError(f"hidden, keep and offsets are shaped {shapes}: give [N, D], [N] and [B + 1]")
    if torch.compiler.is_compiling():  # sizes may be unknown as yet
        torch._check(hidden_ND.shape[0] == keep_N.shape[0])
    elif hidden_ND.shape[0] != keep_N.shape[0]:
        raise ValueError(
            f"there are {hidden_ND.shape[0]} rows but {keep_N.shape[0]} decisions: give one for each row"
        )
    if cu_seqlens_B1.shape[0] == 0:
        raise ValueError("cu_seqlens_B1 is empty: give B + 1 offsets, tensor([0]) for no sequence at all")
    if not hidden_ND.device == keep_N.device == cu_seqlens_B1.device:
        places = f"{hidden_ND.device}, {keep_N.device} and {cu_seqlens_B1.device}"
        raise ValueError(f"hidden, keep and offsets are on {places}: move them to one device")


# The operator: `define` and `impl` add half of what `custom_op` adds to a call, and this is called once a layer.

torch.library.define(
    "lightning_compress::compact",
    "(Tensor hidden, Tensor keep, Tensor cu_seqlens) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("lightning_compress::compact", "CompositeExplicitAutograd", reference.compact)


@cache
def _cuda_implementation() -> Callable[[Tensor, Tensor, Tensor], _Compacted]:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return reference.compact
    from lightning_compress.ops.compact import triton_kernel

    return triton_kernel.compact


@torch.library.impl("lightning_compress::compact", "CUDA")
def _compact_on_cuda(hidden_ND: Tensor, keep_N: Tensor, cu_seqlens_B1: Tensor) -> _Compacted:
    return _cuda_implementation()(hidden_ND, keep_N, cu_seqlens_B1)


@torch.library.register_fake("lightning_compress::compact")
def _fake(hidden_ND: Tensor, keep_N: Tensor, cu_seqlens_B1: Tensor) -> _Compacted:
    num_kept = torch.library.get_ctx().new_dynamic_size()
    hidden_MD = hidden_ND.new_empty(num_kept, hidden_ND.shape[1])
    index_M = keep_N.new_empty(num_kept, dtype=torch.int64)
    return hidden_MD, cu_seqlens_B1.new_empty(cu_seqlens_B1.shape), index_M


def _remember(ctx: Any, inputs: _Compacted, output: _Compacted) -> None:
    ctx.save_for_backward(output[2])
    ctx.num_rows = inputs[0].shape[0]


def _scatter_back(ctx: Any, grad_MD: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None]:
    (index_M,) = ctx.saved_tensors
    zero_ND = grad_MD.new_zeros(ctx.num_rows, grad_MD.shape[1])
    return zero_ND.index_copy(0, index_M, grad_MD), None, None


torch.library.register_autograd("lightning_compress::compact", _scatter_back, setup_context=_remember)
