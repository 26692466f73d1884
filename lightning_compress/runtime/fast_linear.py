"""Engines: one linear with a quantised weight, computed as fast as the machine can.

An engine is built once from a weight, keeps it in the layout that its kernel wants, and reads the bias at every call;
any number of threads may call it. It knows nothing of gradients and of artefacts. Here are those that leave
inputs as they are; the next chapter, :mod:`lightning_compress.runtime.int8_linear`, has those that round them.

Shape legend: M rows of the input, N outputs, K inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.nn.row_buckets import bucket_of
from lightning_compress.runtime.live_bias import LiveBias

__all__ = [
    "DenseEngine",
    "Engine",
    "ModuleEngine",
    "PrepackedEngine",
    "RowEngine",
    "filled_up",
    "first",
    "has_operator",
    "has_prepacked_kernels",
]

Engine = Callable[[Tensor], Tensor]
"""Maps ``[..., K]`` to ``[..., N]``, in the dtype of its input."""

_LOW = torch.empty(0, dtype=torch.bfloat16)


class RowEngine(ABC):
    """An engine that computes rows; whatever came before them comes back."""

    num_outputs: int

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        shape = (*x.shape[:-1], self.num_outputs)
        x_MK = x.reshape(-1, x.shape[-1])
        return self.rows(x_MK).to(x.dtype).view(shape) if x_MK.shape[0] else x.new_empty(shape)

    @abstractmethod
    def rows(self, x_MK: Tensor) -> Tensor:
        """Map at least one row, to ``[M, N]`` in any dtype."""


class PrepackedEngine(RowEngine):
    """A bfloat16 product on CPU whose weight lies as oneDNN wants it, so that no call has to reorder it.

    Inputs are rounded to bfloat16, to no integers.

    Args:
        weight_NK: Weight as it counts, floating point.
        bias_N: Bias, or None.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | LiveBias | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(
            weight_NK.to(torch.bfloat16).contiguous(), None
        )
        self._bias, self.num_outputs = LiveBias.of(bias_N), weight_NK.shape[0]

    def rows(self, x_MK: Tensor) -> Tensor:
        """Map at least one row, to bfloat16 ``[M, N]``."""
        low_MK = filled_up(x_MK.to(torch.bfloat16))
        bias_N = self._bias(torch.bfloat16)
        y_MN = torch.ops.mkldnn._linear_pointwise.default(low_MK, self._weight, bias_N, "none", [], "")
        return first(y_MN, x_MK.shape[0])


class DenseEngine:
    """A floating-point product with the weight written out.

    Args:
        weight_NK: Weight as it counts.
        bias_N: Bias, or None.
        dtype: In which it is computed; inputs are cast to it, and outputs back.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | LiveBias | None, dtype: torch.dtype) -> None:
        self._weight_NK, self._bias = weight_NK.to(dtype), LiveBias.of(bias_N)

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        dtype = self._weight_NK.dtype
        return F.linear(x.to(dtype), self._weight_NK, self._bias(dtype)).to(x.dtype)


class ModuleEngine:
    """A product that another library's layer computes.

    Args:
        module: The layer.
        bias_N: Bias, or None where the layer has one of its own, or none.
    """

    def __init__(self, module: nn.Module, bias_N: Tensor | LiveBias | None = None) -> None:
        self._module, self._bias = module.eval(), LiveBias.of(bias_N)

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        y, bias_N = self._module(x), self._bias(torch.float32)
        return (y if bias_N is None else y + bias_N).to(x.dtype)


def has_prepacked_kernels() -> bool:
    """Whether torch can keep bfloat16 weights in oneDNN's layout."""
    return has_operator("mkldnn", "_reorder_linear_weight") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_operator(library: str, name: str) -> bool:
    """Whether this build of torch has oneDNN and an operator of that name for it."""
    return torch.backends.mkldnn.is_available() and hasattr(getattr(torch.ops, library), name)


def filled_up(rows_MK: Tensor) -> Tensor:
    """Return the rows and spare ones, so that their number is one that oneDNN has met before."""
    rows = rows_MK.shape[0]
    spare = bucket_of(rows, _LOW) - rows if rows > 1 else 0
    return F.pad(rows_MK, (0, 0, 0, spare)) if spare else rows_MK


def first(rows_MN: Tensor, count: int) -> Tensor:
    """Return the first rows; all of them without the cost of a view."""
    return rows_MN if rows_MN.shape[0] == count else rows_MN[:count]
