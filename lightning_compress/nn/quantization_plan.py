"""Puts quantised modules into a model, and rebuilds the same structure on a model that has none.

Poolers, task heads, exits and predictors stay as they are, and so does a table of tokens that shares its weights with a
head. The formats come from :mod:`lightning_compress.nn.operator_formats`; the next chapter is
:mod:`lightning_compress.methods`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import nn

from lightning_compress.nn.operator_formats import OperatorFormats
from lightning_compress.nn.quantized_attention import IMPLEMENTATION, BlockAttention
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import (
    QuantizedActivation,
    QuantizedEmbedding,
    QuantizedNorm,
    is_norm,
)
from lightning_compress.nn.quantized_places import check_finite, find_places
from lightning_compress.nn.surgery import Ledger, get_module, is_linear, unwrap_adapter
from lightning_compress.plan import PlanError

__all__ = ["quantize_model", "restore_quantized"]

_KINDS = ("linears", "embeddings", "norms", "activations", "attention")


def quantize_model(
    model: nn.Module,
    formats: OperatorFormats,
    exclude: Sequence[str] = (),
    ledger: Ledger | None = None,
) -> dict[str, Any]:
    """Quantise the operators of a model that have a format, in place, with the weights it has now.

    Args:
        model: A transformers model of a known family, dense or compressed, on any device.
        formats: Which operators, and how.
        exclude: Patterns (as of :mod:`fnmatch`) of the paths of modules that stay as they are, such as
            ``"*.layer.0.*"``; each has to match one that would be quantised.
        ledger: Where the changes are noted; None notes them nowhere.

    Returns:
        The structure for :func:`restore_quantized`: ``"formats"``, the paths of ``"linears"``, ``"embeddings"``,
        ``"norms"`` and ``"attention"``, and ``"activations"``, the function at each path. Plain JSON values.

    Raises:
        TypeError: If ``model`` is not a ``PreTrainedModel``.
        ValueError: If an operator or a pattern finds nothing in this model, something is quantised already or cannot
            be, or weights are not finite. Nothing has been changed then.

    Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483), without retraining; BCT-style, our own design.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_compress.nn.operator_formats import preset
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=16)
        >>> structure = quantize_model(BertModel(config), preset("w4a8"), exclude=["*query", "*key", "*value"])
        >>> structure["linears"]  # doctest: +NORMALIZE_WHITESPACE
        ['encoder.layer.0.attention.output.dense', 'encoder.layer.0.intermediate.dense',
         'encoder.layer.0.output.dense']
    """
    places = find_places(model, formats, exclude)
    check_finite(model, places)
    structure = {"formats": formats.to_dict(), **places}
    _install(Ledger(model) if ledger is None else ledger, formats, structure, fill=True)
    return structure


def restore_quantized(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Rebuild the quantised modules on a fresh, possibly meta-device model; weights are to be loaded next.

    Raises:
        PlanError: If the structure is none, or names a module that is not of its kind in this model; nothing has been
            changed or allocated then.
    """
    formats = _checked(model, structure)
    ledger = Ledger(model)
    _install(ledger, formats, structure, fill=False)
    return ledger


def _install(ledger: Ledger, formats: OperatorFormats, structure: Mapping[str, Any], *, fill: bool) -> None:
    model = ledger.root
    for path in structure["linears"]:
        path, linear = _linear_at(model, path)
        assert formats.weight is not None
        new = QuantizedLinear.from_linear(linear, formats.weight, formats.input, fill=fill)
        ledger.replace(path, new)
    for path in structure["embeddings"]:
        assert formats.embedding is not None
        table = cast(nn.Embedding, get_module(model, path))
        ledger.replace(path, QuantizedEmbedding.from_embedding(table, formats.embedding, fill=fill))
    for path in structure["norms"]:
        ledger.replace(path, QuantizedNorm(get_module(model, path)))
    for path, function in structure["activations"].items():
        ledger.replace(path, QuantizedActivation(function))
    if structure["attention"]:
        _attend_in_blocks(ledger, structure["attention"], BlockAttention(formats.attention, formats.softmax))


def _attend_in_blocks(ledger: Ledger, paths: Sequence[str], attention: BlockAttention) -> None:
    """Give attention modules their own way to attend, and let the family's code ask for it."""
    model = ledger.root
    before = cast(Any, model).config._attn_implementation
    ledger.on_revert(partial(_set_implementation, paths=tuple(paths), name=before))
    _set_implementation(model, tuple(paths), IMPLEMENTATION)
    for path in paths:
        cast(Any, get_module(model, path)).block_attention = None
        ledger.set_attributes(path, block_attention=attention)


def _set_implementation(model: nn.Module, paths: Sequence[str], name: str) -> None:
    for module in (model, *(get_module(model, path) for path in paths)):
        cast(Any, module).config._attn_implementation = name


def _linear_at(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    inner = unwrap_adapter(model, path)
    return inner, get_module(model, inner)


def _checked(model: nn.Module, structure: Mapping[str, Any]) -> OperatorFormats:
    if set(structure) != {"formats", *_KINDS}:
        raise PlanError(
            f"block_quantization needs the structure {['formats', *_KINDS]}, got fields {sorted(structure)}"
        )
    try:
        formats = OperatorFormats.from_dict(structure["formats"])
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"plan holds unusable formats {structure['formats']!r}: {error}") from error
    needed = {
        "linears": formats.weight is not None,
        "embeddings": formats.embedding is not None,
        "norms": formats.norm,
        "activations": formats.activation,
        "attention": formats.attention is not None or formats.softmax,
    }
    for kind in _KINDS:
        paths = structure[kind]
        if not isinstance(paths, Mapping if kind == "activations" else list):
            raise PlanError(f"plan has {kind} {paths!r}: they have to be listed by path")
        if paths and not needed[kind]:
            raise PlanError(f"plan lists {kind} but has no format for them")
        for path in paths:
            _check_kind(model, kind, path)
    unknown = sorted(map(repr, set(structure["activations"].values()) - set(QuantizedActivation.FUNCTIONS)))
    if unknown:
        raise PlanError(
            f"plan has the activations {unknown}; known are {list(QuantizedActivation.FUNCTIONS)}"
        )
    return formats


def _check_kind(model: nn.Module, kind: str, path: Any) -> None:
    if not isinstance(path, str):
        raise PlanError(f"plan lists {path!r} among {kind}, which is no path")
    try:
        _, module = _linear_at(model, path)
    except ValueError as error:
        raise PlanError(f"plan does not fit the model: {error}") from error
    fits = {
        "linears": is_linear(module),
        "embeddings": type(module) is nn.Embedding,
        "norms": is_norm(module),
        "activations": not any(True for _ in module.parameters()),
        "attention": hasattr(module, "config"),
    }
    if not fits[kind]:
        raise PlanError(f"plan lists {path!r} among {kind}, but it is a {type(module).__name__}")
