"""Quantise a model that is there: one call, without training, and without data or with a few batches.

The same at the end of a run, or trained for, is the callback ``BlockQuantization``; what becomes of the model is in
:mod:`lightning_compress.methods.block_quantization`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lightning_compress.compressor import Compressor
from lightning_compress.deploy.save import attach_plan, plan_of
from lightning_compress.methods.block_quantization import BlockQuantizationConfig as Config
from lightning_compress.nn.anatomy import find_transformer
from lightning_compress.nn.block_format import Factor
from lightning_compress.nn.block_quantization import QuantizationGate
from lightning_compress.nn.compensated_rounding import compensated_weight, gather_moments
from lightning_compress.nn.dropping import DroppingEncoder
from lightning_compress.nn.operator_formats import Preset
from lightning_compress.nn.quantized_places import check_finite, find_places
from lightning_compress.nn.rounded_attention import RoundedAttention
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from lightning_compress.nn.surgery import dense_weight, get_module, unwrap_adapter
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
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> Model:
    """Hold the weights of a model in blocks of few bits, and let it multiply integers; in place.

    Nothing is trained and no data is needed: factors of activations are found anew for every input. In 4 bits a few
    batches can help nevertheless: weights of linears are then rounded such that the outputs suffer least. The model
    may have been compressed before, by any other method of this library; its plan, which ``save_pretrained`` writes,
    tells it. Settings are those of :class:`~lightning_compress.methods.block_quantization.BlockQuantizationConfig`,
    which lists what each may be.

    Args:
        model: A transformers model of a known family, or any module that holds one. LoRA adapters around its linears
            are folded in.
        preset: Bits of weights and activations, such as ``"w4a8"``.
        block: What shares a factor: a row, or so many rows and columns.
        factor: Real scales, or shifts by powers of two.
        operators: What is quantised; ``"all"`` for everything that can be.
        exclude: Which modules stay as they are.
        bits: Where bits differ from the preset's, such as ``{"embedding": 4}``.
        calibration: Batches that the model is run over first, as mappings of what it is called with, such as
            ``itertools.islice(train_loader, 16)``; all are used, labels are not. See
            :func:`~lightning_compress.nn.compensated_rounding.compensated_weight`.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If a setting is out of its range, the model is quantised already, is in training form, something
            in it cannot be quantised, or calibration saw nothing. It is as it was then.
        TypeError: If a batch is no mapping.

    Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483), "without retraining"; BCT-style, our own design.
    Calibration is GPTQ's (arXiv 2210.17323), which those papers do not have.

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
    if calibration is not None:
        _calibrate(transformer, config, calibration)
    attach_plan(model, compressor.convert())
    compressor.forget_stale()
    return model


@torch.no_grad()
def _calibrate(transformer: nn.Module, config: Config, batches: Iterable[Mapping[str, Any]]) -> None:
    """Change weights of linears such that rounding them does the least harm to what batches put out."""
    form = config.formats.weight
    if form is None:
        raise ValueError(
            f"calibration is for weights of linears, and operators={list(config.operators)} leave them as they are: "
            "leave it out"
        )
    places = find_places(transformer, config.formats, config.exclude)
    check_finite(transformer, places)
    paths = places["linears"]
    adapted = [path for path in paths if unwrap_adapter(transformer, path) != path]
    if adapted:
        raise ValueError(
            f"there is an adapter around {adapted[0]}, and calibration is for weights that are whole: merge adapters "
            "first (merge_and_unload of peft), or quantise without calibration"
        )
    moments = gather_moments(transformer, paths, batches)
    weights = {path: dense_weight(get_module(transformer, path)) for path in paths}
    rounded = {path: compensated_weight(weight, moments.pop(path), form) for path, weight in weights.items()}
    for path, weight in weights.items():
        weight.copy_(rounded[path])


def _training_forms(transformer: nn.Module) -> Iterator[str]:
    """Yield the kinds of what methods train in a model: modules, hooks, and ways to attend."""
    for module in transformer.modules():
        parts = (module, *module._forward_hooks.values(), getattr(module, "block_attention", None))
        yield from (kind.__name__ for part in parts for kind in _TRAINED if isinstance(part, kind))
