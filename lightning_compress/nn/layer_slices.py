"""Slices of one layer: attention heads and FFN neurons, taken out of all the linears that hold a part of them.

The next chapter is :mod:`lightning_compress.nn.width_surgery`, for whole models.

Paper: COST-EFF (arXiv 2210.15523), official code.
Departs from the paper: one ``index_select`` per parameter; the official code masks by NaN, and ties shift its rows.

Shape legend: E width of one head, G key-value groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_compress.nn.anatomy import LayerAnatomy
from lightning_compress.nn.linear_slices import slice_at
from lightning_compress.nn.surgery import Ledger

__all__ = ["check_layer", "cut_heads", "cut_neurons"]


def check_layer(
    layer: LayerAnatomy, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None
) -> None:
    """Refuse to keep what a layer does not have; None keeps all.

    Raises:
        ValueError: With what is wrong and what is allowed.
    """
    if heads is not None:
        if layer.attention is None:
            raise ValueError(f"layer {layer.index}, {layer.path!r}, has no attention heads")
        _check_kept("heads", layer.index, heads, layer.num_key_value_heads)
    if neurons is not None:
        if not any(slot.role == "ffn_in" for slot in layer.linears):
            raise ValueError(f"layer {layer.index}, {layer.path!r}, has no FFN")
        _check_kept("neurons", layer.index, neurons, layer.intermediate_size)


def cut_heads(ledger: Ledger, layer: LayerAnatomy, keep: Sequence[int]) -> None:
    """Keep these attention heads of one layer: rows of query, key and value, columns of the output.

    Args:
        ledger: Where the change is noted.
        layer: A layer with attention, as it is now.
        keep: Ids of the heads kept, that :func:`check_layer` let pass; of the key-value groups with grouped queries.
    """
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


def cut_neurons(ledger: Ledger, layer: LayerAnatomy, keep: Sequence[int]) -> None:
    """Keep these FFN neurons of one layer: outputs of the first linear (and of the gate), inputs of the last.

    Args:
        ledger: Where the change is noted.
        layer: A layer with an FFN, as it is now.
        keep: Indices of the neurons kept, that :func:`check_layer` let pass.
    """
    for slot in layer.linears:
        if slot.role in ("ffn_in", "ffn_gate"):
            slice_at(ledger, slot.path, outputs=keep)
        elif slot.role == "ffn_out":
            slice_at(ledger, slot.path, inputs=keep)


def _blocks(keep: Sequence[int], width: int) -> list[int]:
    """Return the entries of the kept blocks, each ``width`` wide."""
    return [block * width + i for block in keep for i in range(width)]


def _check_kept(what: str, layer: int, keep: Sequence[int], count: int) -> None:
    kept = list(keep)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        shown = kept if len(kept) <= 8 else [*kept[:8], "…"]
        raise ValueError(
            f"{what} kept in layer {layer} are {shown}: they must be ascending, at least one, from 0 to {count - 1}"
        )
