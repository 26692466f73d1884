"""Width surgery: take heads, neurons, embedding rank and hidden channels out of a model for good.

What is kept is decided elsewhere and comes as a :class:`Widths`; here parameters become smaller, by one
``index_select`` each, and attention modules learn their new number of heads. Slices of one layer are in
:mod:`lightning_compress.nn.linear_slices`; the next chapter is :mod:`lightning_compress.methods`.

Shape legend: D hidden size, E width of one head, G key-value groups, K kept ones.

Paper: COST-EFF (arXiv 2210.15523), Figure 2 and official code, see the shapes after slenderization there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_compress.nn.anatomy import LayerAnatomy, describe
from lightning_compress.nn.linear_slices import slice_at
from lightning_compress.nn.surgery import Ledger

__all__ = ["Widths", "apply_widths", "slice_heads", "slice_neurons"]


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
    """Rank of the factorised word embeddings."""
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
    _slice_heads(ledger or Ledger(model), anatomy, keep)


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
    _slice_neurons(ledger or Ledger(model), anatomy, keep)


def apply_widths(model: nn.Module, widths: Widths, ledger: Ledger) -> None:
    """Take out of the model what ``widths`` does not keep.

    Args:
        model: A transformers model of a known family, on any device.
        widths: What to keep.
        ledger: Where the changes are noted; its root is ``model``.

    Raises:
        ValueError: If the widths do not fit the model; nothing has been changed then.
    """
    layers = describe(model).layers
    _check(model, widths)
    for anatomy, heads, neurons in zip(layers, widths.heads, widths.neurons, strict=True):
        if heads is not None:
            _slice_heads(ledger, anatomy, heads)
        if neurons is not None:
            _slice_neurons(ledger, anatomy, neurons)


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


def _check_kept(what: str, layer: int, keep: Sequence[int], count: int) -> None:
    """Refuse indices that are not ascending, or not among ``count``."""
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        shown = kept if len(kept) <= 8 else [*kept[:8], "…"]
        raise ValueError(
            f"{what} kept in layer {layer} are {shown}: they must be ascending, at least one, from 0 to {count - 1}"
        )
