"""What widths cost: parameters or FLOPs of a model as a formula in its heads, neurons and embedding ranks.

The next chapter is :mod:`lightning_compress.nn.width_budget`, which chooses widths that a budget allows.

Shape legend: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import nn

from lightning_compress.nn.anatomy import LayerAnatomy, describe
from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.nn.surgery import get_module, linear_shape

__all__ = ["Counts", "LayerCost", "Scope", "WidthCosts"]

Scope: TypeAlias = Literal["linear", "encoder", "total"]
"""Which parameters count: weights of the linears, the layers, or the whole model."""


@dataclass(frozen=True)
class Counts:
    """How much of everything is kept."""

    heads_L: tuple[int, ...]
    """Heads of each layer, or groups that share key and value."""
    neurons_L: tuple[int, ...]
    """Neurons of each layer."""
    embedding_rank: int | None = None
    """Rank of the word embeddings; None leaves them whole."""
    hidden: int | None = None
    """Width of the residual stream; None leaves it whole."""

    def step(self, dense: Counts, done: int, steps: int) -> Counts:
        """Return the counts after ``done`` of ``steps`` equal steps from ``dense`` to these.

        Paper: COST-EFF, specification §3.3: ``int(3072 - (3072 - F) k / K)``, and these exactly for ``k = K``.

        Example:
            >>> Counts((2,), (1024,)).step(Counts((12,), (3072,)), done=3, steps=10)
            Counts(heads_L=(9,), neurons_L=(2457,), embedding_rank=None, hidden=None)
        """

        def at(full: int, final: int) -> int:
            return full - -(-(full - final) * done // steps)

        def pairs(full: Sequence[int], final: Sequence[int]) -> tuple[int, ...]:
            return tuple(at(a, b) for a, b in zip(full, final, strict=True))

        rank, hidden = self.embedding_rank, self.hidden
        return Counts(
            heads_L=pairs(dense.heads_L, self.heads_L),
            neurons_L=pairs(dense.neurons_L, self.neurons_L),
            embedding_rank=None if rank is None else at(dense.embedding_rank or rank, rank),
            hidden=None if hidden is None else at(dense.hidden or hidden, hidden),
        )


@dataclass(frozen=True)
class LayerCost:
    """What one layer's structures cost, in parameters or FLOPs."""

    num_heads: int
    """Heads there are, or groups that share key and value."""
    num_neurons: int
    """Neurons there are."""
    per_head: float
    """Of each head."""
    per_neuron: float
    """Of each neuron."""

    def of(self, heads: float, neurons: float) -> float:
        """Cost of so many of each."""
        return heads * self.per_head + neurons * self.per_neuron


@dataclass(frozen=True)
class WidthCosts:
    """The cost of a model as a formula in its widths; linear, since heads and neurons never meet.

    Example:
        >>> costs = WidthCosts((LayerCost(4, 64, 100.0, 10.0),), fixed=40.0)
        >>> costs.dense, costs.of(Counts((2,), (32,)))
        (1080.0, 560.0)
    """

    layers: tuple[LayerCost, ...]
    fixed: float
    """Of everything else."""
    vocabulary: float = 0.0
    """Of the word embeddings whole, where they are part of what counts."""
    per_rank: float = 0.0
    """Of one rank of factorised word embeddings."""
    hidden_size: int = 0
    """Rank that word embeddings have at most."""

    @classmethod
    def in_parameters(cls, model: nn.Module, scope: Scope) -> WidthCosts:
        """Read the parameters in a scope off a model, which may be on the meta device."""
        anatomy, whole = describe(model), getattr(count_parameters(model), scope)
        layers = tuple(_in_parameters(model, layer, with_bias=scope != "linear") for layer in anatomy.layers)
        table = get_module(model, anatomy.word_embeddings)
        entries, width = (
            table.weight.shape if scope == "total" and isinstance(table, nn.Embedding) else (0, 0)
        )
        fixed = (
            whole - sum(layer.of(layer.num_heads, layer.num_neurons) for layer in layers) - entries * width
        )
        return cls(layers, fixed, entries * width, entries + width, width)

    @classmethod
    def in_flops(cls, model: nn.Module, length: int) -> WidthCosts:
        """Read the FLOPs of the layers, for one text of ``length`` tokens, off a model."""
        layers = []
        for layer in describe(model).layers:
            weights = _in_parameters(model, layer, with_bias=False)
            queries = layer.num_heads // layer.num_key_value_heads
            pairs = 4.0 * length * length * queries * layer.head_dim
            per_head = 2.0 * length * weights.per_head + pairs
            layers.append(replace(weights, per_head=per_head, per_neuron=2.0 * length * weights.per_neuron))
        whole = sum(count_flops(model, [length]).layers)
        fixed = whole - sum(layer.of(layer.num_heads, layer.num_neurons) for layer in layers)
        return cls(tuple(layers), fixed)

    @property
    def full(self) -> Counts:
        """Counts of the model as it is."""
        layers = self.layers
        return Counts(tuple(c.num_heads for c in layers), tuple(c.num_neurons for c in layers))

    @property
    def dense(self) -> float:
        """Cost of the model as it is."""
        return self.of(self.full)

    def of(self, counts: Counts) -> float:
        """Cost of so many heads, neurons and ranks; :attr:`Counts.hidden` is not looked at."""
        rank = counts.embedding_rank
        embeddings = self.vocabulary if rank is None else rank * self.per_rank
        kept = zip(self.layers, counts.heads_L, counts.neurons_L, strict=True)
        return self.fixed + embeddings * bool(self.vocabulary) + sum(c.of(h, n) for c, h, n in kept)


def _in_parameters(model: nn.Module, layer: LayerAnatomy, *, with_bias: bool) -> LayerCost:
    """Weights, and biases if they count, that go with each head and each neuron."""
    per_head = per_neuron = 0.0
    for slot in layer.linears:
        linear = get_module(model, slot.path)
        if slot.role in ("attention_output", "ffn_out"):
            each = _per_input(linear)
        else:
            each = _per_output(linear) + with_bias * (getattr(linear, "bias", None) is not None)
        if slot.role.startswith("ffn"):
            per_neuron += each
        else:
            outputs = linear_shape(linear)[0 if slot.role == "attention_output" else 1]
            per_head += each * outputs / layer.num_key_value_heads
    return LayerCost(layer.num_key_value_heads, layer.intermediate_size, per_head, per_neuron)


def _per_input(linear: nn.Module) -> float:
    """Weights that go with one input: as many as outputs, or ranks."""
    return float(getattr(linear, "rank", linear_shape(linear)[1]))


def _per_output(linear: nn.Module) -> float:
    return float(getattr(linear, "rank", linear_shape(linear)[0]))
