"""Models as exporters can write them: floating point, with weights that stand for integers.

The next chapters are :mod:`lightning_compress.deploy.onnx_program`, which writes them, and
:mod:`lightning_compress.deploy.onnx_int8`, which finds the integers again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import QuantizedActivation, QuantizedEmbedding, QuantizedNorm

__all__ = ["round_by_rows", "to_float_form"]

_ROWS = BlockFormat(8)
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


def round_by_rows(part: nn.Module) -> None:
    """Quantise the linears and tables below a module to 8 bits with a factor for each row, in place.

    Those that are quantised with one factor for a row already keep what they have, in whatever bits; of those with
    several, the values are rounded once more.

    Example:
        >>> part = nn.Sequential(nn.Linear(4, 2))
        >>> round_by_rows(part)
        >>> part[0].weight_format
        BlockFormat(bits=8, block=(1, 0), factor='scale')
    """
    for parent in list(part.modules()):
        for name, module in parent.named_children():
            is_quantized = isinstance(module, QuantizedLinear | QuantizedEmbedding)
            if is_quantized and module.weight_factors.shape[1] == 1:
                continue
            plain = _in_floating_point(module) if is_quantized else module
            if type(plain) is nn.Linear:
                parent._modules[name] = QuantizedLinear.from_linear(plain, _ROWS)
            elif type(plain) is nn.Embedding:
                parent._modules[name] = QuantizedEmbedding.from_embedding(plain, _ROWS)


def to_float_form(model: nn.Module) -> None:
    """Put floating-point modules in the places of quantised ones, in place.

    Weights and tables are those that the integers stand for. What rounds or computes in integers as it runs (inputs of
    linears, attention's products, softmax, activations, norms) is exact from now on.

    Raises:
        TypeError: If a quantised norm is an RMSNorm, which encoders do not have.

    Example:
        >>> model = nn.Sequential(QuantizedLinear.from_linear(nn.Linear(4, 2), BlockFormat(4), BlockFormat(8)))
        >>> to_float_form(model)
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    for parent in list(model.modules()):
        if getattr(parent, "block_attention", None) is not None:
            parent.block_attention = None  # type: ignore[assignment]
        for name, module in parent.named_children():
            parent._modules[name] = _in_floating_point(module)


def _in_floating_point(module: nn.Module) -> nn.Module:
    if isinstance(module, QuantizedLinear):
        new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        new.weight = nn.Parameter(module.dequantized_weight(), requires_grad=False)
        new.bias = module.bias  # type: ignore[assignment]
    elif isinstance(module, QuantizedEmbedding):
        new = nn.Embedding.from_pretrained(module.dequantized_weight(), padding_idx=module.padding_idx)
    elif isinstance(module, QuantizedNorm):
        new = _norm(module)
    elif isinstance(module, QuantizedActivation):
        new = _ACTIVATIONS[module.function]()
    else:
        return module
    return new.train(module.training)


def _norm(norm: QuantizedNorm) -> nn.Module:
    if not norm.is_centred:
        raise TypeError("an RMSNorm in integers has no form in floating point here: export encoders")
    new: Any = nn.LayerNorm(len(norm.weight), eps=norm.eps, bias=norm.bias is not None, device="meta")
    new.weight, new.bias = norm.weight, norm.bias
    return new
