"""Linear layers that hold their weight in few bits, and multiply integers by integers.

The product that is computed here is the meaning: exact integers within a block, see
:mod:`lightning_compress.ops.block_matmul`. An ``engine`` computes it faster. The next chapter is
:mod:`lightning_compress.nn.quantized_parts`.

Shape legend: M rows of the input, N outputs, K inputs, F and G blocks over rows and columns.

Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483), whose bodies were not readable: BCT-style, our own design.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.packed_matrix import PackedMatrix
from lightning_compress.nn.surgery import dense_weight, is_linear, linear_shape
from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_matmul import block_matmul
from lightning_compress.ops.block_quantize import block_quantize

__all__ = ["QuantizedLinear", "check_product_formats"]

Engine = Callable[[Tensor], Tensor]


class QuantizedLinear(PackedMatrix):
    """``y = x W^T + b`` with W in blocks of few bits, and x too, whose factors are found anew for every input.

    Gradients pass straight through the rounding to the input and the bias; the weight has none. There is no attribute
    ``weight``: who adds to it in place, as adapters do when they are merged, is to fail rather than to be forgotten.
    LoRA by peft works on top, where its configuration is told which of its layers to use:
    ``config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})``.

    Args:
        in_features: Inputs K.
        out_features: Outputs N.
        weight_format: In which blocks of how many bits the weight is held.
        input_format: The same of inputs; None multiplies them as they are.
        bias: Whether there is one.
        device: Where the uninitialised tensors are.
        dtype: Dtype of the bias.

    Raises:
        ValueError: If blocks of inputs and weight do not meet along K, see :func:`check_product_formats`.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = linear.weight.copy_(torch.tensor([[1.0, 0.5]]))
        >>> layer = QuantizedLinear.from_linear(linear, BlockFormat(4, factor="shift"), BlockFormat(8, factor="shift"))
        >>> layer.weight_int8().tolist(), layer.weight_factors.tolist()
        ([[4, 2]], [[-2]])
        >>> layer(torch.tensor([3.0, -2.0])).tolist()
        [2.0]
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_format: BlockFormat,
        input_format: BlockFormat | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if input_format is not None:
            check_product_formats(weight_format, input_format)
        super().__init__(out_features, in_features, weight_format, device)
        self.in_features, self.out_features, self.input_format = in_features, out_features, input_format
        self._engine: Engine | None = None
        blank = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", blank)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        weight_format: BlockFormat,
        input_format: BlockFormat | None = None,
        *,
        fill: bool = True,
    ) -> QuantizedLinear:
        """Quantise an ``nn.Linear`` or ``Conv1D``; the bias stays the parameter that it is.

        Args:
            linear: The layer.
            weight_format: In which blocks of how many bits its weight is to be held.
            input_format: The same of inputs; None multiplies them as they are.
            fill: Whether to take over the weight. Otherwise, and on the meta device, it is to be loaded next.

        Raises:
            TypeError: If it is another module.
            ValueError: If the weight holds infinities or NaN, or the formats do not fit together.
        """
        if not is_linear(linear):
            raise TypeError(f"a {type(linear).__name__} cannot be quantised: give an nn.Linear or a Conv1D")
        weight_NK: Any = dense_weight(linear)
        layer = cls(*linear_shape(linear), weight_format, input_format, bias=False, device=weight_NK.device)
        layer.bias = linear.bias  # type: ignore[assignment]
        if fill and not weight_NK.is_meta:
            layer.store(weight_NK.detach())
        return layer.train(linear.training)

    @property
    def engine(self) -> Engine | None:
        """What computes the layer where gradients are off, in the place of the reference; a plain callable.

        It belongs to this very module: copies, pickles and replicas leave it out; moving, casting and loading drop it.
        """
        return self._engine

    @engine.setter
    def engine(self, engine: Engine | None) -> None:
        self._engine = engine

    @property
    def flops_per_token(self) -> int:
        """Operations (2 MACs) per token, whatever their bits."""
        return 2 * self.kept_parameters

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``, in the dtype of the input.

        Raises:
            ValueError: If the input, which is quantised, holds infinities or NaN (on CPU).
        """
        if self._engine is not None and not torch.is_grad_enabled():
            return self._engine(x)
        if self.input_format is None:
            bias_N = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.dequantized_weight().to(x.dtype), bias_N)
        x_MK, held = x.reshape(-1, self.in_features), (self.weight_int8(), self.weight_factors)
        wanted = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        product: Any = _StraightThrough.apply if wanted and torch.is_grad_enabled() else _product
        y_MN = product(x_MK, self.bias, *held, self.weight_format, self.input_format)
        return y_MN.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Show shape and formats in the module's printed form."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.weight_format}, input={self.input_format}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}

    def _replicate_for_data_parallel(self) -> QuantizedLinear:
        replica: QuantizedLinear = super()._replicate_for_data_parallel()  # type: ignore[assignment]
        replica._engine = None
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self._engine = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._engine = None
        super()._load_from_state_dict(*args, **kwargs)


def check_product_formats(weight: BlockFormat, inputs: BlockFormat) -> None:
    """Refuse formats whose blocks cannot be multiplied with each other.

    Raises:
        ValueError: If one has scales and the other shifts, or their blocks are cut differently along K.

    Example:
        >>> check_product_formats(BlockFormat(4, (128, 128)), BlockFormat(8, (1, 128)))
    """
    if weight.factor != inputs.factor:
        raise ValueError(
            f"weights have factor={weight.factor!r}, inputs {inputs.factor!r}: use the same for both"
        )
    edges = {weight.block[1], inputs.block[1]}
    if len(edges - {0}) > 1:
        raise ValueError(
            f"blocks of weights are {weight.block[1]} columns wide, those of inputs {inputs.block[1]}: give them the "
            "same width, or one of them 0 for whole rows"
        )


def _product(
    x_MK: Tensor,
    bias_N: Tensor | None,
    payload_NK: Tensor,
    factors_FG: Tensor,
    weight: BlockFormat,
    inputs: BlockFormat,
) -> Tensor:
    operands = (*block_quantize(x_MK, inputs.bits, inputs.block, inputs.factor), payload_NK, factors_FG)
    bias_N = None if bias_N is None else bias_N.float()
    return block_matmul(*operands, bias_N, inputs.block, weight.block, weight.factor).to(x_MK.dtype)


class _StraightThrough(torch.autograd.Function):
    """The product of integers, with the gradient of the product of what they stand for."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, bias_N: Tensor | None, *held: Any) -> Tensor:
        payload_NK, factors_FG, weight, _ = held
        ctx.save_for_backward(payload_NK, factors_FG)
        ctx.block, ctx.bias_dtype = weight.block, None if bias_N is None else bias_N.dtype
        return _product(x_MK, bias_N, *held)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_MN, grad_x_MK, grad_bias_N = grads[0], None, None
        if ctx.needs_input_grad[0]:
            payload_NK, factors_FG = ctx.saved_tensors
            weight_NK = block_dequantize(payload_NK, factors_FG, ctx.block)
            grad_x_MK = grad_MN @ weight_NK.to(grad_MN.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias_N = grad_MN.sum(0).to(ctx.bias_dtype)
        return grad_x_MK, grad_bias_N, None, None, None, None
