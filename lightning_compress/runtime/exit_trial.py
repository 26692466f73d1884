"""One pass over a data set that asks every exit and lets nobody leave; what any threshold would do is read off it.

That is exact, not an estimate: what an exit says of an example depends neither on the other examples nor on whether
they left. The next chapter is :mod:`lightning_compress.runtime.exit_dial`, which looks for the threshold wanted.

Shape legend: B examples of a batch or of the data set, N rows, C classes, D hidden size, K exits before the last,
L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import find_transformer
from lightning_compress.nn.exit_policy import ExitPolicy, ExitRule
from lightning_compress.nn.kept_flops import DroppingCosts, count_exit_flops
from lightning_compress.nn.segments import Segments
from lightning_compress.runtime.encoder import PackedEncoder
from lightning_compress.runtime.packing import packed_encoder
from lightning_compress.runtime.trial import (
    Batch,
    Score,
    check_batch,
    default_score,
    inputs_of,
    kept_counts,
    lengths_of,
)

__all__ = ["ExitPoint", "ExitTrial", "exit_policy"]

_MARGIN = 1e-6
"""How far a threshold that everybody passes is beyond the last measure."""


@dataclass(frozen=True)
class ExitPoint:
    """What one threshold gives on a data set."""

    threshold: float
    """The threshold of the exit rule."""
    exits: tuple[int, ...]
    """Layers whose exits are asked."""
    score: float | None
    """Accuracy, correlation, or what was asked for; larger is better. None where nothing had to be scored and batches
    have no labels."""
    flops_ratio: float
    """FLOPs over those of the same model without exits, which drops the same tokens; a ratio of totals over unpadded
    tokens, exit heads included, with the last layer counted for all kept tokens."""
    flops: float
    """The same FLOPs, of an example, on average."""
    mean_depth: float
    """Layers that an example runs, on average."""
    leaves_L: tuple[float, ...]
    """Share of the examples that leaves after each layer; at the last, of those that no exit let go."""


def exit_policy(model: nn.Module) -> tuple[PackedEncoder, ExitPolicy]:
    """Return the packed encoder inside a model, and who lets examples leave it.

    Raises:
        ValueError: If the model does not run packed, or has no exits.
    """
    encoder = packed_encoder(model)
    if encoder is None or encoder.exits is None:
        reason = "does not run packed" if encoder is None else "runs packed but has no exits"
        raise ValueError(
            f"{type(model).__name__} {reason}: train it with MultiExit and convert it, or open one that was saved with "
            "lightning_compress.load"
        )
    return encoder, encoder.exits


class ExitTrial:
    """A model with exits and a data set, run once; :meth:`at` tells what any threshold gives.

    Args:
        model: A model with exits that runs packed, or a module that holds one.
        batches: Keyword arguments of the model with ``"labels"``.
        score: Of logits and labels, larger is better; None is accuracy, or Pearson's correlation.
        needs_labels: Whether points must have a score; otherwise they have none if a batch has no labels.

    Raises:
        ValueError: If the model does not run packed or has no exits, there is no batch or one without the labels
            that are needed, or the model gives several labels at once, is to be scored, and ``score`` is None.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        score: Score | None = None,
        *,
        needs_labels: bool = True,
    ) -> None:
        self._encoder, exits = exit_policy(model)
        self.rule: ExitRule = exits.rule
        self.layers = exits.layers
        root: Any = find_transformer(model)[1]
        self._costs = DroppingCosts.of(root, exit_flops=0)
        self._prices = count_exit_flops(root, exits, self.layers)
        self._run(root, exits, batches, needs_labels)
        self._score = None if self.labels_B is None else score or default_score(root)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return self.kept_BL.shape[1]

    def at(self, threshold: float, exits: Iterable[int] | None = None) -> ExitPoint:
        """Return what a threshold gives, when some exits are asked; all if None."""
        asked = self.layers if exits is None or self.rule.looks_back else tuple(exits)
        if threshold == self.rule.off:
            asked = ()
        depth_B, logits_BC = self._outcome(threshold, asked)
        layers_L = torch.arange(self.num_layers)
        kept_BL = self.kept_BL * (depth_B[:, None] > layers_L)
        prices = tuple(price if layer in asked else 0 for layer, price in enumerate(self._prices))
        flops_B = replace(self._costs, exits=prices).flops(kept_BL, self.lengths_B)
        return ExitPoint(
            threshold=float(threshold),
            exits=asked,
            score=None if self._score is None else float(self._score(logits_BC, cast(Tensor, self.labels_B))),
            flops_ratio=float(flops_B.mean()) / self.full_flops,
            flops=float(flops_B.mean()),
            mean_depth=float(depth_B.double().mean()),
            leaves_L=tuple((depth_B[:, None] == layers_L + 1).double().mean(dim=0).tolist()),
        )

    @property
    def full_flops(self) -> float:
        """FLOPs of an example that runs all layers and asks no exit, on average."""
        return float(self._costs.flops(self.kept_BL, self.lengths_B).mean())

    def dense_flops(self, dense: nn.Module) -> float:
        """FLOPs of an example in another model, in which every token runs all layers and no exit is asked, on average.

        Args:
            dense: Of the same layers, maybe on the meta device.
        """
        every_BL = self.lengths_B[:, None].expand_as(self.kept_BL)
        return float(DroppingCosts.of(dense, exit_flops=0).flops(every_BL, self.lengths_B).mean())

    def deployed(self) -> ExitPoint:
        """Return what the model's own threshold gives."""
        return self.at(float(self.rule.threshold), self.rule.checked_layers())

    def curve(self, most: int) -> list[ExitPoint]:
        """Return the model's own point among others, from nobody leaving to as many as can.

        Args:
            most: How many others there are, at most; at least 2.
        """
        exits = self.rule.checked_layers()
        points = [self.deployed(), *(self.at(found, exits) for found in self.thresholds(exits, most))]
        return sorted({p.threshold: p for p in points}.values(), key=lambda point: -point.mean_depth)

    def thresholds(self, exits: Iterable[int], most: int | None = None) -> list[float]:
        """Return a threshold for every difference it can make on these data: from nobody leaving to as many as can.

        Args:
            exits: Layers whose exits are asked.
            most: Return so many of them, evenly, at least 2; None returns all.
        """
        found = self._differences(exits)
        if most is None or len(found) <= most:
            return found
        return [found[round(place * (len(found) - 1) / (most - 1))] for place in range(most)]

    def _differences(self, exits: Iterable[int]) -> list[float]:
        rule, asked = self.rule, set(exits)
        places = [place for place, layer in enumerate(self.layers) if layer in asked]
        found = self.measure_BK[:, places].double().flatten()
        found = found[~found.isnan()].unique()  # ascending
        if rule.looks_back:
            return [rule.off, *found[found >= 1].flip(0).tolist()]
        beyond = found[-1:] * (1 + _MARGIN) + _MARGIN if rule.is_below else found[:1] * (1 - _MARGIN)
        between = (found[1:] + found[:-1]) / 2
        slow_to_fast = torch.cat([between, beyond] if rule.is_below else [between.flip(0), beyond])
        return [rule.off, *(rule.nearest(threshold) for threshold in slow_to_fast.float().tolist())]

    def _outcome(self, threshold: float, asked: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return how many layers each example runs, ``[B]``, and what it is told, ``[B, C]``."""
        threshold = float(
            torch.tensor(threshold, dtype=self.rule.threshold.dtype)
        )  # as the rule remembers it
        depth_B = torch.full((len(self.logits_BC),), self.num_layers)
        logits_BC = self.logits_BC.clone()
        for place in reversed(range(len(self.layers))):
            if self.layers[place] not in asked:
                continue
            leaves_B = self.rule.fires(self.measure_BK[:, place], threshold)
            depth_B[leaves_B] = self.layers[place] + 1
            logits_BC[leaves_B] = self.exit_logits_BKC[leaves_B, place]
        return depth_B, logits_BC

    @torch.no_grad()
    def _run(self, model: Any, exits: ExitPolicy, batches: Iterable[Batch], needs_labels: bool) -> None:
        logits, exit_logits, measures, labels, kept, lengths = [], [], [], [], [], []
        was_training, witness = model.training, _Witness(exits)
        model.eval()
        self._encoder.exits = witness
        try:
            for batch in batches:
                check_batch(batch, needs_labels=needs_labels)
                inputs = inputs_of(model, batch)
                logits.append(model(**inputs).logits.float().cpu())
                exit_logits.append(torch.stack(witness.logits, dim=1).float().cpu())
                measures.append(torch.stack(witness.measures, dim=1).cpu())
                labels += [] if batch.get("labels") is None else [batch["labels"].cpu()]
                kept.append(kept_counts(self._encoder).cpu())
                lengths.append(lengths_of(inputs).cpu())
        finally:
            self._encoder.exits = exits
            model.train(was_training)
        if not logits:
            raise ValueError("there are no batches: give some, as a list or a data loader")
        self.logits_BC, self.exit_logits_BKC = torch.cat(logits), torch.cat(exit_logits)
        self.measure_BK = torch.cat(measures)
        self.labels_B = torch.cat(labels) if len(labels) == len(logits) else None
        self.kept_BL, self.lengths_B = torch.cat(kept), torch.cat(lengths)


class _Witness:
    """Asks every exit, notes what it says and what the rule measures, and lets nobody leave."""

    def __init__(self, exits: ExitPolicy) -> None:
        self.rule, self.layers, self._exits = exits.rule, exits.layers, exits
        self.logits: list[Tensor] = []
        self.measures: list[Tensor] = []

    def start(self, segments: Segments) -> None:
        self.logits, self.measures = [], []
        self.rule.start(segments.num_sequences, segments.origin_N.device)

    def look(self, layer: int, hidden_ND: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        return self._exits.look(layer, hidden_ND, segments)

    def check(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        if layer in self.layers:
            logits_BC, pooled_BD = self.look(layer, hidden_ND, segments)
            self.logits.append(logits_BC)
            self.measures.append(self.rule.measure(layer, logits_BC, pooled_BD))
        return None
