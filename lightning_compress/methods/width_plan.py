"""From the user's wish to numbers: how many heads, neurons, ranks and dimensions are kept, and in how many steps.

The next chapter is :mod:`lightning_compress.methods.width_slimming`.

Shape legend: G heads (groups of query heads that share key and value) and F neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from lightning_compress.methods.width_config import WidthSlimmingConfig
from lightning_compress.nn.anatomy import Anatomy, describe
from lightning_compress.nn.factored_embedding import check_embedding_rank
from lightning_compress.nn.importance import LayerScores
from lightning_compress.nn.surgery import get_module
from lightning_compress.nn.width_budget import choose_counts, choose_kept, default_multiple, keep_best
from lightning_compress.nn.width_costs import Counts, LayerCost, WidthCosts
from lightning_compress.nn.width_slimming import narrowed
from lightning_compress.nn.width_surgery import Widths

__all__ = ["WidthPlan", "plan_widths"]

_STEPS = 8


@dataclass(frozen=True)
class WidthPlan:
    """Where slimming leads, and how."""

    costs: WidthCosts
    """What heads, neurons and ranks cost, at the hidden width that is kept."""
    dense_cost: float
    """Cost of the model as it was."""
    budget: float
    """What the narrow model may cost."""
    dense: Counts
    """Counts before the first step, of everything that is narrowed."""
    final: Counts
    """Counts after the last one; under a global ranking those of heads and neurons are averages."""
    steps: int
    """Steps between the two."""
    multiple: int
    """Neurons are multiples of this."""
    is_joint: bool
    """Whether heads and neurons share one budget, if layers compete."""
    costs_at: Callable[[int | None], WidthCosts]
    """What heads, neurons and ranks cost at any hidden width, such as one on the way; None is the whole one."""

    def choose(
        self,
        scores: Sequence[LayerScores],
        kept: Sequence[LayerScores],
        counts: Counts,
        done: int,
        *,
        ranking: Literal["uniform", "global"],
        per_cost: bool = True,
    ) -> list[LayerScores]:
        """Return the masks after some steps.

        Args:
            scores: Importance of each layer's structures, on any device.
            kept: Masks before.
            counts: Counts after these steps, under a global ranking on average over layers.
            done: Steps taken then.
            ranking: Whether each layer keeps these counts, or all compete.
            per_cost: Whether scores are weighed by cost where heads and neurons share a budget.
        """
        scores = [
            LayerScores(score.heads_G.to(mask.heads_G.device), score.neurons_F.to(mask.neurons_F.device))
            for score, mask in zip(scores, kept, strict=True)
        ]
        if ranking == "global":
            return self._compete(scores, kept, counts, done, per_cost=per_cost)
        return [
            LayerScores(
                keep_best(score.heads_G, heads, mask.heads_G > 0).float(),
                keep_best(score.neurons_F, neurons, mask.neurons_F > 0).float(),
            )
            for score, mask, heads, neurons in zip(
                scores, kept, counts.heads_L, counts.neurons_L, strict=True
            )
        ]

    def _compete(
        self,
        scores: Sequence[LayerScores],
        kept: Sequence[LayerScores],
        counts: Counts,
        done: int,
        *,
        per_cost: bool,
    ) -> list[LayerScores]:
        """Let the structures of all layers compete."""
        if self.is_joint:
            dense, rank = self.costs.dense, counts.embedding_rank
            budget = dense - (dense - self.budget) * done / self.steps
            return choose_kept(
                scores,
                self.costs,
                budget,
                multiple=self.multiple,
                kept=kept,
                embedding_rank=rank,
                per_cost=per_cost,
            )
        heads, neurons = (self._within(scores, kept, counts, is_head=is_head) for is_head in (True, False))
        return [LayerScores(a.heads_G, b.neurons_F) for a, b in zip(heads, neurons, strict=True)]

    def _within(
        self, scores: Sequence[LayerScores], kept: Sequence[LayerScores], counts: Counts, *, is_head: bool
    ) -> list[LayerScores]:
        """Let the heads, or the neurons, of all layers compete; the others cost nothing and all stay."""
        layers = tuple(
            LayerCost(c.num_heads, c.num_neurons, float(is_head), float(not is_head))
            for c in self.costs.layers
        )
        total = sum(counts.heads_L if is_head else counts.neurons_L)
        return choose_kept(
            scores, WidthCosts(layers, 0.0), float(total), multiple=self.multiple, kept=kept, per_cost=False
        )


def plan_widths(model: nn.Module, wish: WidthSlimmingConfig) -> WidthPlan:
    """Turn a wish into counts.

    Raises:
        ValueError: If a count is larger than what there is, heads do not come in whole groups, the target cannot be
            reached, or weights are shared in a way that does not let a width change.
    """
    anatomy = describe(model)
    _check_layers(model, anatomy)
    table: Any = get_module(model, anatomy.word_embeddings)
    width, hidden_size = table.weight.shape[1], anatomy.hidden_size
    hidden = _of_size("hidden", wish.hidden, hidden_size, default_multiple(hidden_size))
    rank = _of_size("embedding_rank", wish.embedding_rank, width, default_multiple(width))
    whole, costs = _costs(model, wish), _costs(_narrow(model, len(anatomy.layers), hidden), wish)
    multiple = wish.ffn_multiple or default_multiple(min(layer.intermediate_size for layer in anatomy.layers))
    heads_L = None if wish.heads is None else [_heads(wish.heads, layer) for layer in anatomy.layers]
    neurons_L = (
        None if wish.ffn is None else [_neurons(wish.ffn, layer, multiple) for layer in anatomy.layers]
    )
    if wish.target is None:
        full = costs.full
        final = Counts(tuple(heads_L or full.heads_L), tuple(neurons_L or full.neurons_L), rank)
        budget = costs.of(final)
    else:
        budget = wish.target * whole.dense
        final = choose_counts(
            costs,
            budget,
            heads_L=heads_L,
            neurons_L=neurons_L,
            embedding_rank=rank,
            multiple=multiple,
            rank_multiple=default_multiple(width),
            dense_cost=whole.dense,
        )
    if final.embedding_rank is not None:
        check_embedding_rank(model, final.embedding_rank)
    final = replace(final, hidden=hidden)
    dense = replace(
        costs.full,
        embedding_rank=None if final.embedding_rank is None else width,
        hidden=None if hidden is None else hidden_size,
    )
    lost = max(a - b for a, b in zip(dense.heads_L, final.heads_L, strict=True))
    is_joint = wish.target is not None and wish.heads is None and wish.ffn is None
    return WidthPlan(
        costs,
        whole.dense,
        budget,
        dense,
        final,
        wish.steps or lost or _STEPS,
        multiple,
        is_joint,
        _CostsByHidden(model, wish, {None: whole, hidden: costs}),
    )


def _costs(model: nn.Module, wish: WidthSlimmingConfig) -> WidthCosts:
    if wish.target_flops is not None:
        return WidthCosts.in_flops(model, wish.text_length)
    return WidthCosts.in_parameters(model, wish.scope)


class _CostsByHidden:
    """Costs at any hidden width, of the model as it is at first, whatever becomes of its linears."""

    def __init__(
        self, model: nn.Module, wish: WidthSlimmingConfig, known: Mapping[int | None, WidthCosts]
    ) -> None:
        self.wish, self.known = wish, dict(known)
        self.num_layers = len(self.known[None].layers)
        is_narrowed = any(hidden is not None for hidden in self.known)
        self.skeleton = narrowed(model, Widths.full(self.num_layers)) if is_narrowed else model

    def __call__(self, hidden: int | None) -> WidthCosts:
        """Return what heads, neurons and ranks cost at a hidden width; None is the whole one."""
        if hidden not in self.known:
            self.known[hidden] = _costs(_narrow(self.skeleton, self.num_layers, hidden), self.wish)
        return self.known[hidden]


def _narrow(model: nn.Module, num_layers: int, hidden: int | None) -> nn.Module:
    if hidden is None:
        return model
    return narrowed(model, replace(Widths.full(num_layers), hidden=tuple(range(hidden))))


def _of_size(name: str, wish: int | float | None, size: int, multiple: int) -> int | None:
    """Return a count for a wish; None where everything stays."""
    if isinstance(wish, float):
        wish = min(max(round(wish * size / multiple), 1) * multiple, size)
    if wish is not None and wish > size:
        raise ValueError(f"{name}={wish} is more than the model has, {size}")
    return None if wish == size else wish


def _heads(wish: int | float, layer: Any) -> int:
    groups, queries = layer.num_key_value_heads, layer.num_heads // layer.num_key_value_heads
    if isinstance(wish, float):
        return max(1, round(wish * groups))
    if wish > layer.num_heads or wish % queries:
        raise ValueError(
            f"heads={wish} must be at most {layer.num_heads}, what layer {layer.index} has, in whole groups of "
            f"{queries} that share key and value"
        )
    return wish // queries


def _neurons(wish: int | float, layer: Any, multiple: int) -> int:
    size = layer.intermediate_size
    if isinstance(wish, float):
        return size if wish == 1.0 else min(max(round(wish * size / multiple), 1) * multiple, size)
    if wish > size:
        raise ValueError(f"ffn={wish} is more than the {size} neurons of layer {layer.index}")
    return wish


def _check_layers(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse families without heads and neurons.

    Raises:
        ValueError: If a layer has no attention or no FFN.
    """
    for layer in anatomy.layers:
        roles = {slot.role for slot in layer.linears}
        if not {"attention_output", "ffn_out"} <= roles:
            raise ValueError(
                f"{type(model).__name__} has no attention heads and FFN neurons to slim: WidthSlimming is for BERT, "
                "RoBERTa, DistilBERT, ELECTRA, GPT-2 and Llama"
            )
