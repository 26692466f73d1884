"""Finds what can be quantised in a model: modules by operator, asked of the anatomy.

The next chapter is :mod:`lightning_compress.nn.quantization_plan`, which changes what is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_compress.nn.anatomy import Anatomy, describe
from lightning_compress.nn.factored_embedding import FactoredEmbedding
from lightning_compress.nn.operator_formats import OperatorFormats
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import (
    QuantizedActivation,
    QuantizedEmbedding,
    QuantizedNorm,
    activation_function,
    is_norm,
)
from lightning_compress.nn.soft_threshold_rank import LowRankLinear
from lightning_compress.nn.surgery import get_module, is_linear, names_of, unwrap_adapter

__all__ = ["check_finite", "find_places"]

_QUANTIZED = (QuantizedLinear, QuantizedEmbedding, QuantizedNorm, QuantizedActivation)


def find_places(model: nn.Module, formats: OperatorFormats, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the formats apply to: paths of ``linears``, ``embeddings``, ``norms`` and ``attention``.

    Of linears these are those of the layers (both factors where the rank is low) and what widens narrow embeddings.
    Under ``activations`` is the function at each path. Tables that share their weights with a head stay as they are.

    Raises:
        TypeError: If ``model`` is not a ``PreTrainedModel``.
        ValueError: If an operator or a pattern of ``exclude`` finds nothing, or what is found is quantised already or
            cannot be quantised.
    """
    anatomy = describe(model)
    finders = {
        "linears": (formats.weight is not None, _linears),
        "embeddings": (formats.embedding is not None, _tables),
        "norms": (formats.norm, _norms),
        "activations": (formats.activation, _activations),
        "attention": (formats.attention is not None or formats.softmax, _attention),
    }
    patterns, unmatched = tuple(exclude), set(exclude)
    places: dict[str, Any] = {}
    for kind, (is_wanted, finder) in finders.items():
        found = list(finder(model, anatomy)) if is_wanted else []
        unmatched -= {p for p in patterns if any(fnmatchcase(path, p) for path in found)}
        places[kind] = [path for path in found if not any(fnmatchcase(path, p) for p in patterns)]
        if is_wanted and not places[kind] and (found or kind != "embeddings"):
            raise ValueError(_nothing_left(model, kind, found, patterns))
    if not any(places.values()):
        raise ValueError(_nothing_left(model, "embeddings", [], patterns))
    if unmatched:
        raise ValueError(
            f"exclude={sorted(unmatched)} match nothing that would be quantised: leave them out, or give patterns of "
            f"paths such as {next(path for paths in places.values() for path in paths)!r}"
        )
    for kind, paths in places.items():
        for path in paths:
            _check_fits(model, kind, path)
    places["activations"] = {
        path: activation_function(get_module(model, path)) for path in places["activations"]
    }
    return places


def check_finite(model: nn.Module, places: Mapping[str, Any]) -> None:
    """Refuse places whose weights hold NaN or infinities, or those of what a method or an adapter trains there.

    What is on the meta device holds nothing.

    Raises:
        ValueError: With the path of the first.
    """
    for path in (*places["linears"], *places["embeddings"], *places["norms"]):
        for name, parameter in get_module(model, path).named_parameters():
            is_weight = not name.endswith("bias") and not parameter.is_meta
            if is_weight and not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"the weight of {path} holds NaN or infinities: quantise finite numbers only (did training "
                    "diverge? A smaller learning rate or gradient_clip_val may help), or exclude it"
                )


def _linears(model: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    paths = [slot.path for slot in anatomy.linears]
    if anatomy.embedding_projection is not None:
        paths.append(anatomy.embedding_projection)
    if isinstance(get_module(model, anatomy.word_embeddings), FactoredEmbedding):
        paths.append(f"{anatomy.word_embeddings}.projection")
    for path in paths:
        if isinstance(get_module(model, path), LowRankLinear):
            yield from (f"{path}.down", f"{path}.up")
        else:
            yield path


def _tables(model: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    """Yield the tables outside layers and heads, but those that share their weights."""
    elsewhere = (*(layer.path for layer in anatomy.layers), *anatomy.head_modules)
    announced = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {*announced, *announced.values()}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding | QuantizedEmbedding):
            continue
        name = f"{path}.weight"
        is_shared = name in shared or len(names_of(model, getattr(module, "weight", None))) > 1
        if not is_shared and not any(path == other or path.startswith(f"{other}.") for other in elsewhere):
            yield path


def _norms(model: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    embeddings = get_module(model, anatomy.embeddings)
    for name, module in embeddings.named_children():
        if is_norm(module) or isinstance(module, QuantizedNorm):
            yield f"{anatomy.embeddings}.{name}"
    yield from (norm for layer in anatomy.layers for norm in layer.norms)
    if anatomy.final_norm is not None:
        yield anatomy.final_norm


def _activations(model: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    yield from (layer.activation for layer in anatomy.layers if layer.activation is not None)


def _attention(model: nn.Module, anatomy: Anatomy) -> Iterator[str]:
    yield from (layer.attention for layer in anatomy.layers if layer.attention is not None)


def _check_fits(model: nn.Module, kind: str, path: str) -> None:
    module: Any = get_module(model, unwrap_adapter(model, path) if kind == "linears" else path)
    if isinstance(module, _QUANTIZED) or getattr(module, "block_attention", None) is not None:
        raise ValueError(
            f"{path} is quantised already, and a model is quantised once: start from the dense model, and name all "
            "operators and bits that are wanted together"
        )
    fits = {
        "linears": is_linear,
        "embeddings": lambda table: type(table) is nn.Embedding and table.max_norm is None,
        "norms": is_norm,
        "activations": lambda activation: activation_function(activation) is not None,
        "attention": lambda attention: hasattr(attention, "config"),
    }
    if not fits[kind](module):
        raise ValueError(
            f"{path} is a {type(module).__name__}, which cannot be quantised: exclude it, or convert the model first "
            "if a method is training it"
        )


def _nothing_left(model: nn.Module, kind: str, found: list[str], patterns: Sequence[str]) -> str:
    if found:
        return (
            f"exclude={list(patterns)} leave none of the {len(found)} {kind}: leave the operator out instead"
        )
    return (
        f"{type(model).__name__} has no {kind} that can be quantised (tables that share their weights with a head stay "
        "as they are): give other operators"
    )
