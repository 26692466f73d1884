"""``lightning_compress::integer_gelu``: GELU, its tanh form, SiLU and ReLU of integers, without a float.

Schema and shapes are here; the next chapter is :mod:`lightning_compress.ops.integer_gelu.reference`, which is the
meaning.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_compress.ops.fixed_point import check_rows
from lightning_compress.ops.integer_gelu import reference

__all__ = ["FUNCTIONS", "integer_gelu"]

FUNCTIONS = tuple(reference.LIMITS)
"""Names of the functions there are."""


def integer_gelu(value_RC: Tensor, exponent_R: Tensor, function: str = "gelu") -> tuple[Tensor, Tensor]:
    """Apply an activation function to rows of integers, in integers.

    The result differs from the exact one by less than 1.6e-4 (2.1e-5 from the table within its range, 1.3e-4 where it
    ends), and from -15 down by the digits that exponents have beyond 2^-15.

    Paper: BCT-style; the papers cover GELU, its formula could not be read: our design [inferred].

    Args:
        value_RC: int32 of magnitudes under 2^15, to be multiplied by ``2 ** exponent``. Not checked.
        exponent_R: One for each row, int32.
        function: "gelu", "gelu_tanh" (also called gelu_new), "silu" or "relu", which is exact.

    Returns:
        int32 ``[R, C]`` and the exponents of its rows, int32 ``[R]``. fp32 holds these numbers exactly.

    Raises:
        TypeError: If a tensor is not int32.
        ValueError: If shapes or devices do not fit together, or the function is none of these.

    Example:
        >>> value, exponent = integer_gelu(torch.tensor([[-2, 2]]).int(), torch.tensor([-1]).int(), "silu")
        >>> value.tolist(), exponent.tolist()  # -0.26894 and 0.73106, times 2^15
        ([[-8813, 23955]], [-15])
    """
    check_rows(value_RC, exponent_R)
    if function not in FUNCTIONS:
        raise ValueError(f"function={function!r} is not one of {', '.join(FUNCTIONS)}")
    return torch.ops.lightning_compress.integer_gelu.default(value_RC, exponent_R, function)


torch.library.define(
    "lightning_compress::integer_gelu",
    "(Tensor value, Tensor exponent, str function) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("lightning_compress::integer_gelu", "CompositeExplicitAutograd", reference.integer_gelu)


@cache
def _cuda_implementation() -> Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]]:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return reference.integer_gelu
    from lightning_compress.ops.integer_gelu import triton_kernel

    return triton_kernel.integer_gelu


@torch.library.impl("lightning_compress::integer_gelu", "CUDA")
def _on_cuda(value_RC: Tensor, exponent_R: Tensor, function: str) -> tuple[Tensor, Tensor]:
    return _cuda_implementation()(value_RC, exponent_R, function)


@torch.library.register_fake("lightning_compress::integer_gelu")
def _fake(value_RC: Tensor, exponent_R: Tensor, function: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value_RC, memory_format=torch.contiguous_format), torch.empty_like(exponent_R)
