"""A frozen model with its linears in 8 or 4 bits: for teachers, of which only input gradients are wanted.

On CPU this saves memory, not time. Who uses it: :mod:`lightning_compress.methods.teacher`.

Shape legend: O output size, I input size.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import replace_module

__all__ = ["dense_state_dict", "few_bit_linear", "few_bit_multiple", "quantize_linears"]

Model = TypeVar("Model", bound=nn.Module)

_MULTIPLES = {8: 8, 4: 64}
"""Sizes that every kernel of the library can do: its 4-bit CPU kernel wants whole blocks of outputs."""


def quantize_linears(model: Model, bits: int) -> Model:
    """Put the linears of a transformers model into few bits, in place; its task head stays as it is.

    8 bits: integers with a scale per output. 4 bits: normal floats (nf4) with a scale per 64 weights. Linears whose
    sizes the library cannot do stay too: sizes have to be multiples of 8, and of 64 in 4 bits.

    Args:
        model: A model of a known family, on any device; nothing of it can be trained afterwards.
        bits: 4 or 8.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If ``bits`` is another number, or no linear has sizes that fit.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=9, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=64)
        >>> model = quantize_linears(BertModel(config, add_pooling_layer=False), bits=8)
        >>> model.encoder.layer[0].intermediate.dense.weight.dtype
        torch.int8
    """
    multiple = few_bit_multiple(bits)
    model.requires_grad_(False)
    heads = describe(model).head_modules
    paths = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and not any(path == head or path.startswith(f"{head}.") for head in heads)
        and module.in_features % multiple == 0
        and module.out_features % multiple == 0
    ]
    if not paths:
        raise ValueError(
            f"{type(model).__name__} has no linear whose sizes are multiples of {multiple}, as {bits} bits need: "
            "leave its linears as they are"
        )
    for path in paths:
        replace_module(model, path, few_bit_linear(model.get_submodule(path), bits))  # type: ignore[arg-type]
    return model


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a model, weights that :func:`quantize_linears` made written out: names are as before.

    Quantising them again gives the same bits.
    """
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            prefix = f"{path}.weight"
            state = {name: value for name, value in state.items() if not name.startswith(f"{prefix}.")}
            for name in ("SCB", "weight_format"):
                state.pop(f"{path}.{name}", None)
            state[prefix] = _dense_weight(module)
    return state


def few_bit_multiple(bits: int) -> int:
    """Return what both sizes of a linear have to be a multiple of.

    Raises:
        ValueError: If ``bits`` is neither 4 nor 8.
    """
    if bits not in _MULTIPLES:
        raise ValueError(f"bits={bits} is not one of {sorted(_MULTIPLES)}")
    return _MULTIPLES[bits]


def few_bit_linear(linear: nn.Linear, bits: int) -> nn.Module:
    """Return a linear whose weight is held in 8 bits or in nf4, with the same bias.

    Args:
        linear: On any device, with sizes that are multiples of :func:`few_bit_multiple`.
        bits: 4 or 8.
    """
    library, weight_OI = _library(), linear.weight.detach()
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    with torch.device("meta"):
        new = (
            library.Linear8bitLt(*sizes, has_fp16_weights=False)
            if bits == 8
            else library.Linear4bit(*sizes, weight_OI.dtype, compress_statistics=False, quant_type="nf4")
        )
    if bits == 8:
        new.weight = library.Int8Params(weight_OI.cpu(), requires_grad=False)
    else:
        new.weight = library.Params4bit(
            weight_OI.cpu(), compress_statistics=False, quant_type="nf4", module=new
        )
    new.bias = linear.bias
    return new.to(weight_OI.device)  # moving is what quantises


def _dense_weight(module: Any) -> Tensor:
    functional = import_module("bitsandbytes.functional")
    weight = module.weight
    if hasattr(weight, "quant_state"):
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    scales_O = weight.SCB if weight.SCB is not None else module.state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales_O)


def _library() -> Any:
    """Import bitsandbytes, and keep it from telling of kernels that nobody asked for and of casts."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        library = import_module("bitsandbytes.nn")
    finally:
        logger.setLevel(level)
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_worth_telling)
    return library


def _is_worth_telling(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)
