"""Width surgery: take heads, neurons, embedding rank and hidden channels out of a model for good.

What is kept is decided elsewhere and comes as a :class:`Widths`; here parameters become smaller, by one
``index_select`` each, and attention modules learn their new number of heads. Slices of one layer are in
:mod:`lightning_compress.nn.linear_slices`; the next chapter is :mod:`lightning_compress.methods`.

Shape legend: D hidden size, E width of one head, G key-value groups, K kept ones.

Paper: COST-EFF (arXiv 2210.15523), Figure 2 and official code, see the shapes after slenderization there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.nn.anatomy import Anatomy, LayerAnatomy, describe, find_transformer
from lightning_compress.nn.factored_embedding import check_embedding_rank, factor_embedding
from lightning_compress.nn.hidden_slices import check_hidden, slice_hidden
from lightning_compress.nn.linear_slices import check_sliceable, slice_at
from lightning_compress.nn.surgery import Ledger, get_module
from lightning_compress.plan import PlanError

__all__ = ["Widths", "apply_widths", "restore_widths", "slice_heads", "slice_hidden", "slice_neurons"]

_FIELDS = {"heads", "neurons", "embedding_rank", "hidden"}


@dataclass(frozen=True)
class Widths:
    """What is left of a model's widths; None leaves a width as it is.

    Indices are ascending and count from 0 in the model as it is before the surgery.
    """

    heads: tuple[tuple[int, ...] | None, ...]
    """For each layer the attention heads kept; with grouped queries the key-value groups, with all their queries."""
    neurons: tuple[tuple[int, ...] | None, ...]
    """For each layer the FFN neurons kept."""
    embedding_rank: int | None = None
    """Rank of the factorised word embeddings; they stay whole where they are no wider, once channels have left."""
    hidden: tuple[int, ...] | None = None
    """Channels of the residual stream kept."""

    @classmethod
    def full(cls, num_layers: int) -> Widths:
        """Return the widths that leave everything as it is.

        Example:
            >>> Widths.full(2)
            Widths(heads=(None, None), neurons=(None, None), embedding_rank=None, hidden=None)
        """
        return cls((None,) * num_layers, (None,) * num_layers)

    def to_structure(self) -> dict[str, Any]:
        """Return what a plan needs to know: ids of heads, numbers of everything else, as plain JSON values.

        Example:
            >>> Widths(heads=((0, 2), None), neurons=((1, 4, 7), None), embedding_rank=16).to_structure()
            {'heads': [[0, 2], None], 'neurons': [3, None], 'embedding_rank': 16, 'hidden': None}
        """
        return {
            "heads": [None if kept is None else list(kept) for kept in self.heads],
            "neurons": [None if kept is None else len(kept) for kept in self.neurons],
            "embedding_rank": self.embedding_rank,
            "hidden": None if self.hidden is None else len(self.hidden),
        }


def slice_heads(model: nn.Module, layer: int, keep: Sequence[int], ledger: Ledger | None = None) -> None:
    """Keep these attention heads of one layer: rows of query, key and value, columns of the output.

    Args:
        model: A transformers model of a known family.
        layer: Index of the layer.
        keep: Ids of the heads kept, ascending, at least one; of the key-value groups with grouped queries.
        ledger: Where the change is noted; None notes it nowhere.

    Raises:
        ValueError: If ids are out of range or not ascending, or the layer has no attention.
    """
    anatomy = _layer(model, layer)
    if anatomy.attention is None:
        raise ValueError(f"layer {layer} of {type(model).__name__} has no attention heads")
    _check_kept("heads", layer, keep, anatomy.num_key_value_heads)
    _slice_heads(Ledger(model) if ledger is None else ledger, anatomy, keep)


def slice_neurons(model: nn.Module, layer: int, keep: Sequence[int], ledger: Ledger | None = None) -> None:
    """Keep these FFN neurons of one layer: outputs of the first linear (and of the gate), inputs of the last.

    Args:
        model: A transformers model of a known family.
        layer: Index of the layer.
        keep: Indices of the neurons kept, ascending, at least one.
        ledger: Where the change is noted; None notes it nowhere.

    Raises:
        ValueError: If indices are out of range or not ascending, or the layer has no FFN.
    """
    anatomy = _layer(model, layer)
    if not any(slot.role == "ffn_in" for slot in anatomy.linears):
        raise ValueError(f"layer {layer} of {type(model).__name__} has no FFN")
    _check_kept("neurons", layer, keep, anatomy.intermediate_size)
    _slice_neurons(Ledger(model) if ledger is None else ledger, anatomy, keep)


def apply_widths(model: nn.Module, widths: Widths, ledger: Ledger) -> None:
    """Take out of the model what ``widths`` does not keep.

    Args:
        model: A transformers model of a known family, on any device.
        widths: What to keep.
        ledger: Where the changes are noted; its root is ``model``.

    Raises:
        ValueError: If the widths do not fit the model; nothing has been changed then.
        TypeError: If there is something in the place of a linear that cannot be sliced; nor then.
    """
    _check(model, widths)
    _cut(model, widths, ledger, decompose=True)


def restore_widths(model: nn.Module, structure: Mapping[str, Any]) -> Ledger:
    """Give a fresh, possibly meta-device model the widths of a plan; weights are to be loaded next.

    Args:
        model: A transformers model of a known family, or a module that holds one.
        structure: :meth:`Widths.to_structure` of what was applied.

    Returns:
        The ledger, for the transformers model.

    Raises:
        PlanError: If the structure does not fit the model; nothing has been changed then.
    """
    inner = find_transformer(model)[1]
    try:
        widths = _read_structure(describe(inner), structure)
        _check(inner, widths)
    except (TypeError, ValueError) as error:
        raise PlanError(f"the plan's widths do not fit the model: {error}") from error
    ledger = Ledger(inner)
    _cut(inner, widths, ledger, decompose=False)
    return ledger


def _cut(model: nn.Module, widths: Widths, ledger: Ledger, *, decompose: bool) -> None:
    for anatomy, heads, neurons in zip(describe(model).layers, widths.heads, widths.neurons, strict=True):
        if heads is not None:
            _slice_heads(ledger, anatomy, heads)
        if neurons is not None:
            _slice_neurons(ledger, anatomy, neurons)
    if widths.hidden is not None:
        slice_hidden(model, widths.hidden, ledger)
    if widths.embedding_rank is not None:
        width = get_module(model, describe(model).word_embeddings).weight.shape[1]  # type: ignore[union-attr,index]
        factor_embedding(model, min(widths.embedding_rank, int(width)), ledger, decompose=decompose)


def _read_structure(anatomy: Anatomy, structure: Mapping[str, Any]) -> Widths:
    """Return widths with as many indices as the plan counts: which ones does not matter for shapes."""
    if set(structure) != _FIELDS:
        raise ValueError(f"expected the fields {sorted(_FIELDS)}, got {sorted(structure)}")
    heads, neurons = structure["heads"], structure["neurons"]
    for ids in (heads, neurons):
        if not isinstance(ids, list) or len(ids) != len(anatomy.layers):
            raise ValueError(f"heads and neurons need a list of {len(anatomy.layers)} entries, got {ids!r}")
    if not all(ids is None or (isinstance(ids, list) and all(type(i) is int for i in ids)) for ids in heads):
        raise TypeError(f"heads must be lists of whole numbers or null, got {heads!r}")
    sizes = [layer.intermediate_size for layer in anatomy.layers]
    return Widths(
        heads=tuple(None if ids is None else tuple(ids) for ids in heads),
        neurons=tuple(_first(count, size, "neurons") for count, size in zip(neurons, sizes, strict=True)),
        embedding_rank=structure["embedding_rank"],
        hidden=_first(structure["hidden"], anatomy.hidden_size, "hidden"),
    )


def _first(count: Any, size: int, name: str) -> tuple[int, ...] | None:
    if count is None:
        return None
    if type(count) is not int or not 1 <= count <= size:
        raise ValueError(f"{name} must be null or whole numbers from 1 to {size}, got {count!r}")
    return tuple(range(count))


def _slice_heads(ledger: Ledger, layer: LayerAnatomy, keep: Sequence[int]) -> None:
    assert layer.attention is not None
    groups, width = layer.num_key_value_heads, layer.head_dim
    num_heads, query_width = len(keep) * (layer.num_heads // groups), layer.num_heads * width
    of_queries = _blocks(keep, query_width // groups)
    of_keys = _blocks(keep, width)
    outputs: dict[str, list[int]] = {
        "query": of_queries,
        "key": of_keys,
        "value": of_keys,
        "query_key_value": [part * query_width + i for part in range(3) for i in of_queries],
    }
    for slot in layer.linears:
        if slot.role in outputs:
            slice_at(ledger, slot.path, outputs=outputs[slot.role])
        elif slot.role == "attention_output":
            slice_at(ledger, slot.path, inputs=of_queries)
    counts = dict.fromkeys(layer.head_count_attributes, num_heads)
    widths = dict.fromkeys(layer.head_width_attributes, num_heads * width)
    ledger.set_attributes(layer.attention, **counts, **widths)


def _slice_neurons(ledger: Ledger, layer: LayerAnatomy, keep: Sequence[int]) -> None:
    for slot in layer.linears:
        if slot.role in ("ffn_in", "ffn_gate"):
            slice_at(ledger, slot.path, outputs=keep)
        elif slot.role == "ffn_out":
            slice_at(ledger, slot.path, inputs=keep)


def _blocks(keep: Sequence[int], width: int) -> list[int]:
    """Return the entries of the kept blocks, each ``width`` wide."""
    return [block * width + i for block in keep for i in range(width)]


def _layer(model: nn.Module, layer: int) -> LayerAnatomy:
    layers = describe(model).layers
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer={layer} is outside the model's layers, 0 to {len(layers) - 1}")
    return layers[layer]


def _check(model: nn.Module, widths: Widths) -> None:
    layers = describe(model).layers
    if not len(widths.heads) == len(widths.neurons) == len(layers):
        raise ValueError(
            f"widths are for {len(widths.heads)} layers of heads and {len(widths.neurons)} of neurons, "
            f"the model has {len(layers)} layers"
        )
    for anatomy, heads, neurons in zip(layers, widths.heads, widths.neurons, strict=True):
        if heads is not None:
            _check_kept("heads", anatomy.index, heads, anatomy.num_key_value_heads)
        if neurons is not None:
            _check_kept("neurons", anatomy.index, neurons, anatomy.intermediate_size)
        if heads is not None or neurons is not None:
            for slot in anatomy.linears:
                check_sliceable(model, slot.path)
    if widths.embedding_rank is not None:
        check_embedding_rank(model, widths.embedding_rank)
    if widths.hidden is not None:
        check_hidden(model, widths.hidden)


def _check_kept(what: str, layer: int, keep: Sequence[int], count: int) -> None:
    """Refuse indices that are not ascending, or not among ``count``."""
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        shown = kept if len(kept) <= 8 else [*kept[:8], "…"]
        raise ValueError(
            f"{what} kept in layer {layer} are {shown}: they must be ascending, at least one, from 0 to {count - 1}"
        )
