"""The words of an anatomy, and the registry of the functions that fill them in, by ``config.model_type``.

All paths are dotted and relative to the ``PreTrainedModel`` that was described. The next chapter is
:mod:`lightning_compress.nn.anatomy.lookup`, which the family files are written with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn
from transformers import PreTrainedModel

__all__ = [
    "Anatomy",
    "Family",
    "LayerAnatomy",
    "LinearSlot",
    "Role",
    "UnknownFamilyError",
    "describe",
    "known_families",
    "register_family",
]

Role = Literal[
    "query",
    "key",
    "value",
    "query_key_value",
    "attention_output",
    "ffn_in",
    "ffn_gate",
    "ffn_out",
    "mixer_in",
    "mixer_out",
]


class UnknownFamilyError(ValueError):
    """The model belongs to no known family, or is not laid out as its family is."""


@dataclass(frozen=True)
class LinearSlot:
    """A place where a linear layer sits, whatever has taken its place since."""

    path: str
    """Dotted path, e.g. ``"bert.encoder.layer.0.attention.self.query"``; an adapter's wrapper keeps it."""
    role: Role
    """What the layer computes."""
    layer: int
    """Index of the layer, from 0."""


@dataclass(frozen=True)
class LayerAnatomy:
    """One transformer layer (or one Mamba block)."""

    path: str
    """Path of the layer module."""
    index: int
    """Position in the stack, from 0."""
    linears: tuple[LinearSlot, ...]
    """Replaceable linears in the order in which they run."""
    attention: str | None
    """Path of the module whose ``forward`` computes the attention; None without attention."""
    num_heads: int
    """Query heads this layer has now; 0 without attention."""
    num_key_value_heads: int
    """Key and value heads this layer has now; equal to ``num_heads`` without grouped queries."""
    head_dim: int
    """Width of one head; 0 without attention."""
    intermediate_size: int
    """Neurons of the FFN (channels of the mixer in Mamba)."""
    norms: tuple[str, ...]
    """Paths of the layer's normalisations in the order in which they run."""
    raw_linears: tuple[str, ...] = ()
    """Linears that run on every token but are read as raw weights: parametrise, do not replace."""
    activation: str | None = None
    """Path of the FFN's activation; None where it is no module."""
    attention_dropout: str | None = None
    """Path of the dropout whose probability applies to attention weights."""
    output_dropout: str | None = None
    """Path of the dropout between the attention's output and the residual addition; None where there is none."""
    ffn_dropout: str | None = None
    """Path of the dropout between the FFN's output and the residual addition."""
    head_count_attributes: tuple[str, ...] = ()
    """Attributes of the attention module that hold the number of query heads."""
    head_width_attributes: tuple[str, ...] = ()
    """Attributes of the attention module that hold the width of all query heads together."""


@dataclass(frozen=True)
class Anatomy:
    """One model, as it is now."""

    model_type: str
    """``config.model_type``."""
    base: str
    """Path of the base model; empty if the model is one."""
    layers: tuple[LayerAnatomy, ...]
    """The layers in order."""
    embeddings: str
    """Path of the module that embeds tokens; that of the token table where the family has no such module."""
    word_embeddings: str
    """Path of the token table."""
    final_norm: str | None
    """Path of the norm after the last layer (pre-norm families)."""
    pooler: str | None
    """Path of the base model's pooler."""
    head: str | None
    """Path of the last module of the task head, which returns the logits; None for a base model."""
    hidden_size: int
    """Width of the residual stream."""
    vocab_size: int
    """Entries of the vocabulary."""
    is_decoder: bool
    """Whether attention is causal."""
    is_post_norm: bool
    """Whether norms follow the residual additions (BERT) rather than precede the sub-layers (GPT-2)."""
    head_modules: tuple[str, ...] = ()
    """All modules of the task head in the order in which they run; the last one is ``head``."""
    is_head_per_token: bool = False
    """Whether the head runs on every token (language models, taggers, decoders) or once per sequence."""
    embedding_projection: str | None = None
    """Path of the linear between embeddings narrower than the hidden size and the first layer (ELECTRA)."""
    encoder: str | None = None
    """Path of the module that runs the layers one after the other and does nothing else (post-norm families)."""
    residual_writers: tuple[str, ...] = ()
    """Tables, norms and linears outside the layers whose outputs are as wide as the residual stream and part of it."""
    residual_readers: tuple[str, ...] = ()
    """Linears outside the layers that read the residual stream: of the pooler and of the task head."""

    @property
    def linears(self) -> tuple[LinearSlot, ...]:
        """The linear slots of all layers, in order."""
        return tuple(slot for layer in self.layers for slot in layer.linears)


Family: TypeAlias = Callable[[PreTrainedModel], Anatomy]
"""Describes the models of one family."""

_FAMILIES: dict[str, Family] = {}


def register_family(model_type: str) -> Callable[[Family], Family]:
    """Register the function that describes models with this ``config.model_type``.

    Running the same definition again (a reloaded module, a notebook cell) replaces it.

    Raises:
        ValueError: If another function is registered for the type.

    Example:
        >>> @register_family("my-bert")
        ... def describe_my_bert(model: PreTrainedModel) -> Anatomy: ...
        >>> "my-bert" in known_families()
        True
        >>> del _FAMILIES["my-bert"]
    """

    def register(family: Family) -> Family:
        known = _FAMILIES.get(model_type, family)
        if (known.__module__, known.__qualname__) != (family.__module__, family.__qualname__):
            raise ValueError(f"model type {model_type!r} is registered already, by {known!r}")
        _FAMILIES[model_type] = family
        return family

    return register


def known_families() -> tuple[str, ...]:
    """Return the registered model types, sorted."""
    return tuple(sorted(_FAMILIES))


def describe(model: nn.Module) -> Anatomy:
    """Return the anatomy of a transformers model, with the shapes and layers it has now.

    Replaced linears, adapters around linears, layers removed from the stack and head counts that differ from
    layer to layer are all seen as they are.

    Args:
        model: The ``PreTrainedModel`` itself; :func:`~lightning_compress.nn.anatomy.find_transformer` finds
            it inside a module that holds it.

    Raises:
        TypeError: If ``model`` is not a transformers ``PreTrainedModel``.
        UnknownFamilyError: If its ``config.model_type`` is not registered, or a module is not where the
            family has it.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}: "
            "pass the model that find_transformer(...) returns"
        )
    model_type = model.config.model_type
    if model_type not in _FAMILIES:
        raise UnknownFamilyError(
            f"no anatomy for config.model_type {model_type!r} ({type(model).__name__}); known families: "
            f"{', '.join(known_families())}. Looked for were the layers, their linears and norms, the "
            "embeddings and the head. To add the family, write fn(model) -> Anatomy and decorate it with "
            f"@lightning_compress.nn.anatomy.register_family({model_type!r})"
        )
    return _FAMILIES[model_type](model)
