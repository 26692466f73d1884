"""Width surgery: take heads, neurons, embedding rank and hidden channels out of a model for good.

What is kept is decided elsewhere and comes as a :class:`Widths`; here parameters become smaller, by one
``index_select`` each, and attention modules learn their new number of heads. Slices of one layer are in
:mod:`lightning_compress.nn.layer_slices`; the next chapter is :mod:`lightning_compress.methods`.

Paper: COST-EFF (arXiv 2210.15523), Figure 2 and official code: the shapes after slenderization. The hidden width is
not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.nn.anatomy import Anatomy, describe, find_transformer
from lightning_compress.nn.factored_embedding import check_embedding_rank, factor_embedding
from lightning_compress.nn.hidden_slices import check_hidden, slice_hidden
from lightning_compress.nn.layer_slices import check_layer, cut_heads, cut_neurons
from lightning_compress.nn.linear_slices import check_sliceable
from lightning_compress.nn.surgery import Ledger, get_module, names_of
from lightning_compress.plan import PlanError

__all__ = ["Widths", "apply_widths", "restore_widths"]

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
            cut_heads(ledger, anatomy, heads)
        if neurons is not None:
            cut_neurons(ledger, anatomy, neurons)
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


def _check(model: nn.Module, widths: Widths) -> None:
    layers = describe(model).layers
    if not len(widths.heads) == len(widths.neurons) == len(layers):
        raise ValueError(
            f"widths are for {len(widths.heads)} layers of heads and {len(widths.neurons)} of neurons, "
            f"the model has {len(layers)} layers"
        )
    for anatomy, heads, neurons in zip(layers, widths.heads, widths.neurons, strict=True):
        check_layer(anatomy, heads, neurons)
        if heads is not None or neurons is not None:
            for slot in anatomy.linears:
                check_sliceable(model, slot.path)
                _check_untied(model, slot.path)
    if widths.embedding_rank is not None:
        check_embedding_rank(model, widths.embedding_rank)
    if widths.hidden is not None:
        check_hidden(model, widths.hidden)


def _check_untied(model: nn.Module, path: str) -> None:
    for parameter in get_module(model, path).parameters():
        shared = names_of(model, parameter)
        if len(shared) > 1:
            raise ValueError(
                f"the weights of {path} are shared, as {list(shared)}: slices would untie them. Give each layer its own"
            )
