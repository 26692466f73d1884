"""One pass over a data set at one setting of the dial: score, FLOPs, and how many tokens each layer kept.

The next chapter is :mod:`lightning_compress.runtime.dial`, which looks for the setting that is wanted.

Shape legend: B sequences, C classes, L layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import find_transformer
from lightning_compress.nn.kept_flops import DroppingCosts
from lightning_compress.runtime.encoder import PackedEncoder
from lightning_compress.runtime.packing import packed_encoder

__all__ = [
    "Batch",
    "DialPoint",
    "ScaledPolicy",
    "Score",
    "ScoredPoint",
    "Trial",
    "check_batch",
    "default_score",
    "dropping_encoder",
    "inputs_of",
    "is_regression",
    "kept_counts",
    "lengths_of",
    "scale_of",
    "score_of",
]

Batch = Mapping[str, Any]
Score = Callable[[Tensor, Tensor], float]
"""Of logits ``[B, C]`` and labels ``[B]`` of a whole data set; larger is better."""


class ScaledPolicy(Protocol):
    """What the dial asks of a :class:`~lightning_compress.nn.dropping.KeepPolicy`."""

    scale: Tensor
    """How much is dropped: 0 nothing, 1 as trained, larger more; a 0-dim buffer, at least 0."""


@dataclass(frozen=True)
class DialPoint:
    """What one setting of the dial gives on a data set."""

    scale: float
    """Setting of the dial."""
    score: float | None
    """Accuracy, correlation, or what was asked for; larger is better. None where nothing had to be scored and batches
    have no labels."""
    flops_ratio: float
    """FLOPs over those of the model that drops nothing, scores nothing and has no exits; a ratio of totals over
    unpadded tokens, with the last layer counted for all kept tokens, as the paper does."""
    tokens_kept_L: tuple[float, ...]
    """Share of all tokens that enters each layer's attention."""


class ScoredPoint(Protocol):
    """What one setting of any dial gives."""

    @property
    def score(self) -> float | None:
        """Larger is better; None where nothing was scored."""
        ...


def score_of(point: ScoredPoint) -> float:
    """Return the score of a point that was measured with labels."""
    assert point.score is not None, "batches have labels where scores are compared"
    return point.score


def dropping_encoder(model: nn.Module) -> PackedEncoder:
    """Return the packed encoder, with a policy that drops tokens, inside a model.

    Raises:
        ValueError: If the model does not run packed, or drops no tokens.
    """
    encoder = packed_encoder(model)
    if encoder is None:
        raise ValueError(
            f"{type(model).__name__} does not run packed: train it with ContributionTokenDropping and convert it, or "
            "open one that was saved with lightning_compress.load"
        )
    if encoder.policy is None:
        raise ValueError(
            f"{type(model).__name__} runs packed but has no policy that drops tokens: train it with "
            "ContributionTokenDropping first"
        )
    return encoder


def scale_of(encoder: PackedEncoder) -> Tensor:
    """Return the buffer that is the dial."""
    return cast(ScaledPolicy, encoder.policy).scale


def kept_counts(encoder: PackedEncoder) -> Tensor:
    """Return how many tokens of each sequence entered each layer in the latest pass, integers ``[B, L]``."""
    return torch.stack([segments.lengths_B for segments in encoder.latest], dim=1)


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what of a batch the model takes, on its device, without labels."""
    names = set(inspect.signature(model.forward).parameters) - {"labels"}
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name in names
    }


def check_batch(batch: Any, *, needs_labels: bool = True) -> None:
    """Refuse a batch that the dial cannot be measured with.

    Raises:
        ValueError: If it is not a mapping, or has no ``"labels"`` where they are needed.
    """
    if not isinstance(batch, Mapping):
        labels = " with 'labels'" if needs_labels else ""
        raise ValueError(
            f"a batch is a {type(batch).__name__}: give dicts of the model's keyword arguments{labels}"
        )
    if needs_labels and batch.get("labels") is None:
        raise ValueError(f"a batch holds {sorted(batch)} but no 'labels': the score is measured with them")


class Trial:
    """A model and a data set, to be measured at one scale after the other.

    Args:
        model: A token-dropping model that runs packed, or a module that holds one.
        batches: Keyword arguments of the model with ``"labels"``; kept, so that any iterable will do.
        score: Of logits and labels, larger is better; None is accuracy, or Pearson's correlation.
        needs_labels: Whether points must have a score; otherwise they have none if a batch has no labels.

    Raises:
        ValueError: If the model does not run packed or drops no tokens, there is no batch or one without the labels
            that are needed, or the model gives several labels at once, is to be scored, and ``score`` is None.
    """

    score: Score | None
    """None where there is nothing to score with."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        score: Score | None = None,
        *,
        needs_labels: bool = True,
    ) -> None:
        self.encoder = dropping_encoder(model)
        self.model: Any = find_transformer(model)[1]
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("there are no batches: give some, as a list or a data loader")
        for batch in self.batches:
            check_batch(batch, needs_labels=needs_labels)
        is_labelled = all(batch.get("labels") is not None for batch in self.batches)
        self.score = (score or default_score(self.model)) if is_labelled else None
        self.costs = DroppingCosts.of(self.model)
        self.dense_costs = DroppingCosts.of(self.model, policy_flops_per_token=0, exit_flops=0)

    @torch.no_grad()
    def at(self, scale: float) -> DialPoint:
        """Measure one setting; the dial is as before afterwards."""
        buffer, was_training = scale_of(self.encoder), self.model.training
        before = buffer.clone()
        self.model.eval()
        try:
            buffer.fill_(scale)
            return self._measure(scale)
        finally:
            self.model.train(was_training)
            buffer.copy_(before)

    def _measure(self, scale: float) -> DialPoint:
        logits, labels, kept, lengths = [], [], [], []
        for batch in self.batches:
            inputs = inputs_of(self.model, batch)
            logits.append(self.model(**inputs).logits.float().cpu())
            labels += [] if self.score is None else [batch["labels"].cpu()]
            kept.append(kept_counts(self.encoder).cpu())
            lengths.append(lengths_of(inputs).cpu())
        kept_BL, lengths_B = torch.cat(kept), torch.cat(lengths)
        dense_BL = lengths_B[:, None].expand_as(kept_BL)
        flops = self.costs.flops(kept_BL, lengths_B).sum() / self.dense_costs.flops(dense_BL, lengths_B).sum()
        shares = (kept_BL.sum(dim=0) / lengths_B.sum()).tolist()
        score = None if self.score is None else float(self.score(torch.cat(logits), torch.cat(labels)))
        return DialPoint(float(scale), score, float(flops), tuple(shares))


def lengths_of(inputs: Batch) -> Tensor:
    """Return the tokens of each example of a batch, padding not included, integers ``[B]``."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.bool().sum(dim=1)
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    return torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)


def default_score(model: Any) -> Score:
    """Return how a model is scored where nobody says: accuracy, or Pearson's correlation of one output.

    Raises:
        ValueError: If the model gives several labels at once.
    """
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        raise ValueError("the model gives several labels at once: say what to measure with score=function")
    return _correlation if is_regression(model) else _accuracy


def is_regression(model: Any) -> bool:
    """Whether a model answers with a number, not a class."""
    return model.config.num_labels == 1 or getattr(model.config, "problem_type", None) == "regression"


def _accuracy(logits_BC: Tensor, labels_B: Tensor) -> float:
    return float((logits_BC.argmax(dim=-1) == labels_B.flatten()).double().mean())


def _correlation(logits_BC: Tensor, labels_B: Tensor) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    pair = torch.stack([logits_BC.flatten(), labels_B.flatten().float()]).double()
    pair = pair - pair.mean(dim=1, keepdim=True)
    norm = pair.norm(dim=1).prod()
    return float(pair.prod(dim=0).sum() / norm) if norm > 0 else 0.0
