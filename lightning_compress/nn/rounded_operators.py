"""Single operators as training sees them: rounded by degrees, with gradients that pass as if there were no rounding.

What calls these functions are the hooks of :mod:`lightning_compress.nn.block_quantization`. Where width gates have
closed features, the others are rounded as if those had been cut off already. Embeddings are in
:mod:`lightning_compress.nn.rounded_embedding`.

Shape legend: ... any leading sizes, N outputs, K inputs, R rank, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.nn.adapters import adapter_factors
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.fake_quantize import fake_block_matmul, fake_quantize
from lightning_compress.nn.integer_functional import (
    activation_of_integers,
    layernorm_of_integers,
    rmsnorm_of_integers,
)
from lightning_compress.nn.quantized_parts import QuantizedNorm
from lightning_compress.nn.rank_budget import LayerSize, layer_cost
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from lightning_compress.nn.surgery import dense_weight, linear_shape
from lightning_compress.ops.block_matmul import block_matmul
from lightning_compress.ops.block_quantize import block_quantize

__all__ = [
    "Ramp",
    "rounded_activation",
    "rounded_linear",
    "rounded_norm",
    "rounded_product",
    "scattered",
    "selected",
]


class Ramp:
    """How much of the rounding is seen, the same everywhere in a model.

    Example:
        >>> ramp = Ramp()
        >>> ramp.set(0.25)
        >>> ramp.blend(torch.tensor(1.0), torch.tensor(3.0))
        tensor(1.5000)
    """

    def __init__(self) -> None:
        self.strength = torch.zeros(())
        """A tensor, so that compiled graphs do not depend on its value."""
        self.is_active = False
        """Whether anything is seen."""
        self.is_full = False
        """Whether all is."""

    @property
    def value(self) -> float:
        """The strength, from 0 to 1."""
        return float(self.strength)

    def set(self, value: float) -> None:
        """Change the strength, for all who share it."""
        self.strength = torch.tensor(float(value))
        self.is_active, self.is_full = value > 0.0, value == 1.0

    @property
    def is_as_deployed(self) -> bool:
        """Whether integers are to be multiplied as they will be once the model is converted."""
        return self.is_full and not torch.is_grad_enabled()

    def blend(self, exact: Tensor, held: Tensor) -> Tensor:
        """Return what lies between a tensor and its rounded form."""
        return held if self.is_full else exact + self.strength.to(exact.dtype) * (held - exact)


def rounded_linear(
    module: nn.Module,
    x: Tensor,
    ramp: Ramp,
    inputs_K: Tensor | None,
    outputs_N: Tensor | None,
    *,
    weight: BlockFormat,
    inputs: BlockFormat | None,
) -> Tensor:
    """Return what a linear layer puts out when its weight and its input ``[..., K]`` are rounded.

    A layer whose rank is being learned is rounded as the two products that it will be, or as one if it will be dense;
    an adapter as what it will add to the weights.

    Args:
        module: ``nn.Linear``, ``Conv1D`` or a ``SoftThresholdLinear``, or a LoRA adapter around one.
        x: Its input.
        ramp: How much of the rounding is seen.
        inputs_K: Indices of the inputs that count; None for all.
        outputs_N: Indices of the outputs that count, of which the others are zero; None for all.
        weight: Format of the weight.
        inputs: Format of the input; None leaves it as it is.
    """
    inner: Any = getattr(module, "base_layer", module)
    matrices = _matrices(inner, None if inner is module else module, inputs_K, outputs_N)
    bias_N, size = selected(inner.bias, outputs_N), linear_shape(inner)[1]
    x = x if inputs_K is None else x.index_select(-1, inputs_K)
    for index, matrix in enumerate(matrices):
        is_last = index == len(matrices) - 1
        x = rounded_product(x, matrix, bias_N if is_last else None, ramp, weight, inputs)
    return scattered(x, outputs_N, size)


def rounded_product(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    ramp: Ramp,
    weight: BlockFormat,
    inputs: BlockFormat | None,
) -> Tensor:
    """Return ``x W^T + b`` with both factors rounded, ``[..., N]``."""
    x_MK, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], len(weight_NK))
    if inputs is not None and ramp.is_as_deployed:
        return _integer_product(x_MK, weight_NK, bias_N, weight, inputs).reshape(shape)
    if (
        inputs is not None and ramp.is_full and weight.factor == "shift"
    ):  # sums of aligned integers are rounded too
        return fake_block_matmul(x_MK, weight_NK, inputs, weight, bias_N).to(x.dtype).reshape(shape)
    held_NK = ramp.blend(weight_NK, fake_quantize(weight_NK, weight))
    held_MK = x_MK if inputs is None else ramp.blend(x_MK, fake_quantize(x_MK, inputs))
    return F.linear(held_MK, held_NK, bias_N).reshape(shape)


def _integer_product(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, weight: BlockFormat, inputs: BlockFormat
) -> Tensor:
    """Return what a ``QuantizedLinear`` would, without making one: compiled graphs cannot."""
    rows = block_quantize(x_MK, inputs.bits, inputs.block, inputs.factor)
    matrix = block_quantize(weight_NK, weight.bits, weight.block, weight.factor)
    bias_N = None if bias_N is None else bias_N.float()
    return block_matmul(*rows, *matrix, bias_N, inputs.block, weight.block, weight.factor).to(x_MK.dtype)


def rounded_norm(module: nn.Module, x: Tensor, output: Tensor, ramp: Ramp, kept_D: Tensor | None) -> Tensor:
    """Return a norm of ``[..., D]`` computed in integers, over the channels that count; the others are zero."""
    norm = QuantizedNorm(module)
    weight_D, bias_D = selected(norm.weight, kept_D), selected(norm.bias, kept_D)
    x = x if kept_D is None else x.index_select(-1, kept_D)
    if norm.is_centred:
        held = layernorm_of_integers(x, weight_D, bias_D, norm.eps)
    else:
        held = rmsnorm_of_integers(x, weight_D, norm.eps)
    return ramp.blend(output, scattered(held, kept_D, output.shape[-1]))


def rounded_activation(
    x: Tensor, output: Tensor, ramp: Ramp, kept_D: Tensor | None, *, function: str
) -> Tensor:
    """Return an activation of ``[..., D]`` computed in integers; features that do not count are zero."""
    x = x if kept_D is None else x.index_select(-1, kept_D)
    held = activation_of_integers(x, function)
    return ramp.blend(output, scattered(held, kept_D, output.shape[-1]))


def selected(vector: Any, kept: Tensor | None) -> Any:
    """Return the entries of a vector that count, or None if there is none."""
    return vector if vector is None or kept is None else vector.index_select(0, kept)


def scattered(x: Tensor, kept: Tensor | None, size: int) -> Tensor:
    """Put features back where they come from, among zeros.

    Example:
        >>> scattered(torch.tensor([5.0, 7.0]), torch.tensor([0, 2]), 3)
        tensor([5., 0., 7.])
    """
    return x if kept is None else x.new_zeros(*x.shape[:-1], size).index_copy(-1, kept, x)


def _matrices(layer: Any, adapter: Any, inputs_K: Tensor | None, outputs_N: Tensor | None) -> list[Tensor]:
    """Return the weights by which a layer multiplies one after the other, once it is converted."""
    if not isinstance(layer, SoftThresholdLinear):
        weight_NK = dense_weight(layer)
        extra_NR, extra_RK = adapter_factors(adapter, weight_NK)
        weight_NK = weight_NK + extra_NR @ extra_RK if extra_NR.shape[1] else weight_NK
        return [_sliced(_sliced(weight_NK, outputs_N, 0), inputs_K, 1)]
    u_NR, scaled_RK = layer._factors()
    extra_NR, extra_RK = adapter_factors(adapter, u_NR.new_empty(layer.out_features, layer.in_features))
    u_NR, extra_NR = _sliced(u_NR, outputs_N, 0), _sliced(extra_NR, outputs_N, 0)
    scaled_RK, extra_RK = _sliced(scaled_RK, inputs_K, 1), _sliced(extra_RK, inputs_K, 1)
    size, rank = LayerSize(scaled_RK.shape[1], len(u_NR), len(extra_RK)), len(scaled_RK)
    if layer.mode == "pinned" and rank < layer.full_rank and layer_cost(size, rank, 1, 1.0) < size.dense:
        return [torch.cat([scaled_RK, extra_RK], dim=0), torch.cat([u_NR, extra_NR], dim=1)]
    return [u_NR @ scaled_RK + extra_NR @ extra_RK]


def _sliced(matrix: Tensor, kept: Tensor | None, dim: int) -> Tensor:
    return matrix if kept is None else matrix.index_select(dim, kept)
