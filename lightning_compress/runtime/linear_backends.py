"""The backends of quantised linears by name, what each can compute, and how its engine is made.

The next chapters: :mod:`lightning_compress.runtime.engine_timing` compares them, and
:mod:`lightning_compress.runtime.backends` gives each layer of a model its own.

Shape legend: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.few_bits import few_bit_linear, few_bit_multiple
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.runtime.block_linear import BlockEngine
from lightning_compress.runtime.dynamic_linear import DynamicEngine, has_dynamic_kernels
from lightning_compress.runtime.fast_linear import (
    DenseEngine,
    Engine,
    ModuleEngine,
    PrepackedEngine,
    has_prepacked_kernels,
)
from lightning_compress.runtime.int8_linear import CudaInt8Engine, Int8Engine, has_int8_kernels
from lightning_compress.runtime.live_bias import LiveBias

__all__ = ["BACKENDS", "build_engine", "output_scales", "refusal"]

BACKENDS = ("int8", "triton", "bf16", "fp32", "bnb8", "nf4")
"""Integers times integers by whole rows, or in any blocks by Triton; inputs as they are times the weight in bfloat16,
in float32, or in 8 or 4 bits by bitsandbytes."""

_FEW_BITS = {"bnb8": 8, "nf4": 4}
_FLOAT_INPUTS = (
    'its inputs are not quantised; use "bf16" or "fp32", or a preset that quantises them, such as "w8a8"'
)


def build_engine(
    backend: str, layers: Sequence[QuantizedLinear] | QuantizedLinear, *, one_factor: bool = False
) -> Engine:
    """Make the engine of a layer, or one for several that read the same input.

    Args:
        backend: One of :data:`BACKENDS`.
        layers: Layers on one device and with equal formats of inputs.
        one_factor: Let ``"int8"`` round all rows of a call by one factor, whatever the format says; with 8 bits on a
            processor by PyTorch's own dynamic quantisation.

    Raises:
        ValueError: If the backend is unknown, or cannot compute the layers.

    Example:
        >>> layer = QuantizedLinear.from_linear(nn.Linear(4, 2), BlockFormat())
        >>> build_engine("fp32", layer)(torch.ones(3, 4)).shape
        torch.Size([3, 2])
    """
    parts = [layers] if isinstance(layers, QuantizedLinear) else list(layers)
    reason = refusal(backend, parts, one_factor=one_factor)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot compute {parts[0]}: {reason}")
    bias = LiveBias(parts)
    if backend == "int8":
        held = _rounding(parts[0], one_factor)
        weight_NK = torch.cat([part.weight_int8() for part in parts])
        scales_N = torch.cat([output_scales(part) for part in parts])  # type: ignore[misc]
        if one_factor and held.bits == 8 and weight_NK.device.type == "cpu" and has_dynamic_kernels():
            return DynamicEngine(weight_NK, scales_N, bias)
        engine = CudaInt8Engine if weight_NK.is_cuda else Int8Engine
        return engine(weight_NK, scales_N, bias, held)
    if backend == "triton":
        held, columns = _rounding(parts[0], one_factor=False), parts[0].weight_format.block[1]
        weight_NK = _stacked([part.weight_int8() for part in parts])
        return BlockEngine(weight_NK, _stacked([_row_factors(part) for part in parts]), bias, columns, held)
    weight_NK = torch.cat([part.dequantized_weight() for part in parts])
    if backend in _FEW_BITS:
        return ModuleEngine(few_bit_linear(_dense(weight_NK), _FEW_BITS[backend]), bias)
    if backend == "bf16" and weight_NK.device.type == "cpu" and has_prepacked_kernels():
        return PrepackedEngine(weight_NK, bias)
    return DenseEngine(weight_NK, bias, torch.bfloat16 if backend == "bf16" else torch.float32)


def refusal(
    backend: str, layers: Sequence[QuantizedLinear] | QuantizedLinear, *, one_factor: bool = False
) -> str | None:
    """Return why a backend cannot compute layers together, and what to do; None if it can.

    Raises:
        ValueError: If the backend is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {list(BACKENDS)}")
    parts = [layers] if isinstance(layers, QuantizedLinear) else list(layers)
    if len({_what_joined_layers_share(part) for part in parts}) > 1:
        return (
            "the layers differ in device, bias, format of inputs or columns of blocks, and cannot be joined"
        )
    if backend == "int8":
        return _int8_refusal(parts, one_factor)
    if backend == "triton":
        return _triton_refusal(parts)
    return _few_bits_refusal(parts, _FEW_BITS[backend]) if backend in _FEW_BITS else None


def output_scales(layer: QuantizedLinear) -> Tensor | None:
    """Return what an integer of each output is worth, float32 ``[N]``; None where a row has several factors.

    Example:
        >>> layer = QuantizedLinear.from_linear(nn.Linear(4, 3), BlockFormat(block=(2, 0), factor="shift"))
        >>> output_scales(layer).shape
        torch.Size([3])
    """
    if layer.weight_factors.shape[1] != 1:
        return None
    factors_N = _row_factors(layer)[:, 0]
    return factors_N if factors_N.dtype == torch.float32 else torch.exp2(factors_N.float())


def _row_factors(layer: QuantizedLinear) -> Tensor:
    """Return the factors of each output's blocks, ``[N, G]``, however many outputs share them."""
    factors_FG, rows = layer.weight_factors, layer.weight_format.block[0]
    if rows == 1:
        return factors_FG
    return factors_FG.repeat_interleave(rows or layer.out_features, 0)[: layer.out_features]


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _what_joined_layers_share(part: QuantizedLinear) -> tuple[object, ...]:
    return part.input_format, part.weight_format.block[1], part.weight_payload.device, part.bias is None


def _int8_refusal(parts: list[QuantizedLinear], one_factor: bool) -> str | None:
    held, device = parts[0].input_format, parts[0].weight_payload.device.type
    if held is None:
        return _FLOAT_INPUTS
    if not one_factor and held.block not in ((1, 0), (0, 0)):
        return (
            f"its inputs are in blocks {held.block}, and integers are multiplied fast by whole rows only; quantise "
            'it by rows, or use "bf16" or "fp32"'
        )
    if any(part.weight_factors.shape[1] != 1 for part in parts):
        return (
            f"its weight is in blocks {parts[0].weight_format.block}, with several factors for an output; quantise it "
            'by rows, or use "bf16" or "fp32"'
        )
    if device == "cuda":
        sizes = [size for part in parts for size in (part.in_features, part.out_features)]
        return (
            "integer tensor cores want sizes that are multiples of 8" if any(s % 8 for s in sizes) else None
        )
    if device != "cpu" or not has_int8_kernels():
        return "this device has no such kernels (a processor with VNNI or CUDA has)"
    return None


def _triton_refusal(parts: list[QuantizedLinear]) -> str | None:
    if parts[0].input_format is None:
        return _FLOAT_INPUTS
    if parts[0].weight_payload.device.type != "cuda":
        return 'Triton kernels run on CUDA; on a processor use "int8", "bf16" or "fp32"'
    if find_spec("triton") is None:
        return "Triton is not installed: pip install lightning-compress[triton]"
    return None


def _few_bits_refusal(parts: list[QuantizedLinear], bits: int) -> str | None:
    multiple, outputs = few_bit_multiple(bits), sum(part.out_features for part in parts)
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install bitsandbytes"
    if parts[0].in_features % multiple or outputs % multiple:
        return f"bitsandbytes wants sizes that are multiples of {multiple} in {bits} bits"
    return None


def _rounding(layer: QuantizedLinear, one_factor: bool) -> BlockFormat:
    assert layer.input_format is not None
    return replace(layer.input_format, block=(0, 0)) if one_factor else layer.input_format


def _dense(weight_NK: Tensor) -> nn.Linear:
    linear = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_NK, requires_grad=False)
    return linear
