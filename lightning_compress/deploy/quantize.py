"""Quantise a model that is there: one call, without training and without data.

The same at the end of a run, or trained for, is the callback ``BlockQuantization``; what becomes of the model is in
:mod:`lightning_compress.methods.block_quantization`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from lightning_compress.compressor import Compressor
from lightning_compress.deploy.save import attach_plan, plan_of
from lightning_compress.methods.block_quantization import BlockQuantizationConfig as Config
from lightning_compress.nn.anatomy import find_transformer
from lightning_compress.nn.block_format import Factor
from lightning_compress.nn.block_quantization import QuantizationGate
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.operator_formats import Preset
from lightning_compress.nn.rounded_attention import RoundedAttention
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from lightning_compress.nn.width_slimming import WidthGates

__all__ = ["quantize"]

Model = TypeVar("Model", bound=nn.Module)

_TRAINED = (WidthGates, SoftThresholdLinear, DroppingEncoder, QuantizationGate, RoundedAttention)


def quantize(
    model: Model,
    preset: Preset = Config.preset,
    *,
    block: Literal["row"] | Sequence[int] = Config.block,
    factor: Factor = Config.factor,
    operators: Sequence[str] | str = Config.operators,
    exclude: Sequence[str] = Config.exclude,
    bits: Mapping[str, int] | Sequence[str] = Config.bits,
) -> Model:
    """Hold the weights of a model in blocks of few bits, and let it multiply integers; in place.

    Nothing is trained and no data is needed: factors of activations are found anew for every input. The model may have
    been compressed before, by any other method of this library; its plan, which ``save_pretrained`` writes, tells it.
    Settings are those of :class:`~lightning_compress.methods.block_quantization.BlockQuantizationConfig`, which lists
    what each may be.

    Args:
        model: A transformers model of a known family, or any module that holds one. LoRA adapters around its linears
            are folded in.
        preset: Bits of weights and activations, such as ``"w4a8"``.
        block: What shares a factor: a row, or so many rows and columns.
        factor: Real scales, or shifts by powers of two.
        operators: What is quantised; ``"all"`` for everything that can be.
        exclude: Which modules stay as they are.
        bits: Where bits differ from the preset's, such as ``{"embedding": 4}``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If a setting is out of its range, the model is quantised already, is in training form, or something
            in it cannot be quantised. It is as it was then.

    Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483), "without retraining"; BCT-style, our own design.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=16)
        >>> model = quantize(BertModel(config), "w4a8", block=(1, 4))
        >>> type(model.encoder.layer[0].intermediate.dense).__name__
        'QuantizedLinear'
    """
    words: Any = {"block": block, "operators": operators, "exclude": exclude, "bits": bits}
    config = Config(preset=preset, factor=factor, **words)
    transformer = find_transformer(model)[1]
    trained = next(_training_forms(transformer), None)
    if trained is not None:
        raise ValueError(
            f"the model is in training form (it has a {trained}): call lightning_compress.convert(module) first, or "
            "add BlockQuantization to the callbacks of its run"
        )
    compressor = Compressor(transformer, [config], plan=plan_of(model))
    compressor.prepare()
    attach_plan(model, compressor.convert())
    compressor.forget_stale()
    return model


def _training_forms(transformer: nn.Module) -> Iterator[str]:
    """Yield the kinds of what methods train in a model: modules, hooks, and ways to attend."""
    for module in transformer.modules():
        parts = (module, *module._forward_hooks.values(), getattr(module, "block_attention", None))
        yield from (kind.__name__ for part in parts for kind in _TRAINED if isinstance(part, kind))
