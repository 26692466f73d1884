"""What a model costs: FLOPs and parameters, counted analytically from its anatomy.

FLOPs are 2 MACs, over unpadded tokens. A layer that is not a plain linear tells its own cost:
``flops_per_token`` (FLOPs) and ``kept_parameters`` (weights without biases, as deployed). The next chapter is
:mod:`lightning_compress.metrics`, which adds such counts up over a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_compress.nn.anatomy import Anatomy, LayerAnatomy, describe
from lightning_compress.nn.surgery import get_module, is_linear, linear_shape
from lightning_compress.nn.width_slimming import as_deployed

__all__ = [
    "FlopsCount",
    "ParameterCount",
    "count_bytes",
    "count_flops",
    "count_parameters",
    "flops_per_token",
]


@dataclass(frozen=True)
class FlopsCount:
    """FLOPs (2 MACs) of one forward pass over some sequences."""

    total: float
    """Everything below together."""
    layers: tuple[float, ...]
    """Linears and attention of each layer."""
    head: float
    """Pooler and task head."""
    embeddings: float = 0.0
    """Projections of narrow or factorised embeddings; the look-ups themselves are free."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters as deployed, in three scopes."""

    linear: int
    """Weights of the layers' linears, without biases."""
    encoder: int
    """Everything in the layers: weights, biases and norms."""
    layers: tuple[int, ...]
    """The same of each layer."""
    total: int
    """The whole model; tied weights are counted once."""


def count_flops(model: nn.Module, lengths: Sequence[int]) -> FlopsCount:
    """Count the FLOPs of one forward pass of ``model``, as it is now, over unpadded sequences.

    Per layer and token ``2 * in * out`` for each linear (or its own ``flops_per_token``); per layer and
    sequence of n tokens ``4 * n^2 * heads * head_dim`` for QK^T and AV, the full square for decoders too, as
    other counters have it. The pooler runs once per sequence; the head too, or on every token for language
    models, taggers and all decoders. Embedding look-ups, norms, softmax, activations, convolutions and
    Mamba's scan are not counted.

    Args:
        model: A transformers model of a known family; may be on the meta device.
        lengths: Tokens of each sequence, padding not included, each at least 1.

    Raises:
        TypeError: If ``model`` is not a ``PreTrainedModel``.
        ValueError: If the family is unknown, or ``lengths`` is empty or holds a length below 1.

    Departs from the paper: COST-EFF's official code profiles every input padded to 128 tokens; here padding
    costs nothing. A full 128 tokens cost BERT-base 11.17 GMAC.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=16)
        >>> count_flops(BertModel(config), lengths=[3]).layers  # 3 * 2 * (4 * 8 * 8 + 2 * 8 * 16) + 4 * 9 * 8
        (3360.0,)
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(
            f"lengths must hold at least one sequence length, each 1 or more; got {list(lengths)}"
        )
    model = as_deployed(model)
    anatomy = describe(model)
    tokens, squares = float(sum(lengths)), float(sum(length * length for length in lengths))
    layers = tuple(_layer_flops(model, layer, tokens, squares) for layer in anatomy.layers)
    head = _head_flops(model, anatomy, tokens, len(lengths))
    projections = [anatomy.embeddings] + [path for path in [anatomy.embedding_projection] if path is not None]
    embeddings = tokens * sum(flops_per_token(get_module(model, path)) for path in projections)
    return FlopsCount(sum(layers) + head + embeddings, layers, head, embeddings)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of ``model`` as it would be deployed now.

    A layer that has ``kept_parameters`` counts as that many weights, plus its biases: in training form it
    holds more than will be left. What width gates have closed does not count. An adapter counts while it is active
    and not merged.

    Args:
        model: A transformers model of a known family; may be on the meta device.

    Raises:
        TypeError: If ``model`` is not a ``PreTrainedModel``.
        ValueError: If the family is unknown.
    """
    model = as_deployed(model)
    anatomy = describe(model)
    seen: set[int] = set()
    layers = tuple(_deployed_size(get_module(model, layer.path), seen) for layer in anatomy.layers)
    return ParameterCount(
        linear=sum(
            _linear_cost(get_module(model, slot.path), "kept_parameters", 1) for slot in anatomy.linears
        ),
        encoder=sum(layers),
        layers=layers,
        total=_deployed_size(model, set()),
    )


def count_bytes(model: nn.Module) -> int:
    """Count the bytes that the weights of ``model``, as they are, take in a file, tied ones once.

    The file's own header, some 100 bytes for each tensor, is not counted.

    Args:
        model: Any module; may be on the meta device.

    Example:
        >>> count_bytes(nn.Linear(4, 8)), count_bytes(nn.Linear(4, 8).bfloat16())
        (160, 80)
    """
    state = model.state_dict(keep_vars=True).values()
    tensors = {id(held): held for held in state if isinstance(held, Tensor)}
    return sum(held.numel() * held.element_size() for held in tensors.values())


def flops_per_token(module: nn.Module) -> int:
    """Return the FLOPs (2 MACs) of all linears in ``module``, each run once per token.

    A module with an attribute ``flops_per_token`` answers for itself and everything inside it.

    Example:
        >>> flops_per_token(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)))
        96
    """
    return _linear_cost(module, "flops_per_token", 2)


def _layer_flops(model: nn.Module, layer: LayerAnatomy, tokens: float, squares: float) -> float:
    paths = [slot.path for slot in layer.linears] + list(layer.raw_linears)
    linears = sum(flops_per_token(get_module(model, path)) for path in paths)
    return tokens * linears + 4 * squares * layer.num_heads * layer.head_dim


def _head_flops(model: nn.Module, anatomy: Anatomy, tokens: float, sequences: int) -> float:
    pooler = flops_per_token(get_module(model, anatomy.pooler)) if anatomy.pooler is not None else 0
    head = sum(flops_per_token(get_module(model, path)) for path in anatomy.head_modules)
    return float(sequences * pooler) + head * (tokens if anatomy.is_head_per_token else sequences)


def _linear_cost(module: nn.Module, declared: str, per_weight: int) -> int:
    """Sum ``per_weight`` times the weights of all linears in ``module``, or what modules declare instead."""
    cost = getattr(module, declared, None)
    if cost is not None:
        return int(cost)
    if not is_linear(module):
        inner = sum(_linear_cost(part, declared, per_weight) for part in _running_parts(module))
        if inner or not hasattr(module, "in_features"):
            return inner
    in_features, out_features = linear_shape(module)
    return per_weight * in_features * out_features


def _deployed_size(module: nn.Module, seen: set[int]) -> int:
    """Count the parameters in ``module`` whose ids are not in ``seen``, and add them to it."""
    if id(module) in seen:
        return 0
    seen.add(id(module))
    kept = getattr(module, "kept_parameters", None)
    if kept is None:
        own = sum(_new_size(parameter, seen) for parameter in module.parameters(recurse=False))
        return own + sum(_deployed_size(part, seen) for part in _running_parts(module))
    parameters = dict(module.named_parameters())
    if parameters and all(id(parameter) in seen for parameter in parameters.values()):
        return 0
    sizes = {name: _new_size(parameter, seen) for name, parameter in parameters.items()}
    return int(kept) + sum(size for name, size in sizes.items() if name.rpartition(".")[2] == "bias")


def _new_size(parameter: nn.Parameter, seen: set[int]) -> int:
    if id(parameter) in seen:
        return 0
    seen.add(id(parameter))
    return parameter.numel()


def _running_parts(module: nn.Module) -> list[nn.Module]:
    """Return the children that run: of a peft wrapper the layer inside and what its active adapters add."""
    base_layer, original = getattr(module, "base_layer", None), getattr(module, "original_module", None)
    if not isinstance(base_layer, nn.Module) and not isinstance(original, nn.Module):
        return list(module.children())
    is_idle = getattr(module, "merged", False) or getattr(module, "disable_adapters", False)
    tables = [child for child in module.children() if isinstance(child, nn.ModuleDict)]
    active = [] if is_idle else list(getattr(module, "active_adapters", ()))
    adapters = [table[name] for table in tables for name in active if name in table]
    if isinstance(base_layer, nn.Module):
        return [base_layer, *adapters]
    return adapters or [child for child in [original] if isinstance(child, nn.Module)]
