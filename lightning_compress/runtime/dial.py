"""The dial: trade speed for accuracy after training, by one number that scales all thresholds of a model.

A policy that can be dialled has a 0-dim buffer ``scale``: 1 is as trained, larger drops more, 0 drops nothing. It is
part of the model's state, so what is dialled is saved. The next chapter is :mod:`lightning_compress.runtime.static`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn

from lightning_compress.runtime.trial import (
    Batch,
    DialPoint,
    Score,
    Trial,
    dropping_encoder,
    scale_of,
    score_of,
)

__all__ = [
    "DialPoint",
    "choose_threshold_scale",
    "set_threshold_scale",
    "sweep_threshold_scale",
    "threshold_scale",
]

_OCTAVES = (-12.0, 18.0)
"""Powers of two between which a scale is looked for; at the upper end only protected tokens stay."""
_BISECTIONS = 11
_NEGLIGIBLE = 1e-9
_NEAR = 0.995
"""A share of FLOPs of at least this much of the target, and not above it, is on target."""


def threshold_scale(model: nn.Module) -> float:
    """Return the dial of a token-dropping model; 1 is as trained.

    Raises:
        ValueError: If the model does not run packed, or drops no tokens.
    """
    return float(scale_of(dropping_encoder(model)))


def set_threshold_scale(model: nn.Module, scale: float) -> None:
    """Drop more or fewer tokens than was trained, by scaling all thresholds of a token-dropping model.

    Args:
        model: A converted or loaded token-dropping model, or a module that holds one.
        scale: 0 drops nothing, 1 is as trained, larger drops more. Replaces what was set before.

    Raises:
        ValueError: If the scale is negative or not finite, or the model does not run packed or drops no tokens.
    """
    _check_scale(scale)
    with torch.no_grad():
        scale_of(dropping_encoder(model)).fill_(scale)


def sweep_threshold_scale(
    model: nn.Module, batches: Iterable[Batch], scales: Iterable[float], *, score: Score | None = None
) -> list[DialPoint]:
    """Measure a token-dropping model at several settings of the dial, and leave the dial as it was.

    Args:
        model: A converted or loaded token-dropping model, or a module that holds one.
        batches: Keyword arguments of the model with ``"labels"``, such as a data loader yields. Other entries that
            the model does not take are left out.
        scales: Settings to measure, each at least 0.
        score: Of logits and labels, larger is better. None is the accuracy of classifiers, and Pearson's correlation
            of models with one output.

    Returns:
        One point per scale, in the order given.

    Raises:
        ValueError: If a scale is out of range, the model does not run packed or drops no tokens, or there is no data or
            no label.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from lightning_compress import Compressor, ContributionTokenDroppingConfig
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        ...                     intermediate_size=16)
        >>> model = BertForSequenceClassification(config)
        >>> compressor = Compressor(model, [ContributionTokenDroppingConfig()])
        >>> compressor.prepare()
        >>> plan = compressor.convert()
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([0])}
        >>> [point.tokens_kept_L for point in sweep_threshold_scale(model, [batch], [0.0, 99.0])]
        [(1.0, 1.0), (0.25, 0.25)]
    """
    scales = list(scales)
    for scale in scales:
        _check_scale(scale)
    trial = Trial(model, batches, score)
    return [trial.at(scale) for scale in scales]


def choose_threshold_scale(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    max_drop: float | None = None,
    target_flops: float | None = None,
    score: Score | None = None,
) -> DialPoint:
    """Find the setting of the dial that does what is wanted on a data set, and set it.

    Args:
        model: A converted or loaded token-dropping model, or a module that holds one.
        batches: See :func:`sweep_threshold_scale`; data that the model was not trained on. For ``target_flops`` they
            need no ``"labels"``, unless ``score`` is given.
        max_drop: By how much the score may be below that with nothing dropped, in [0, 1): of the scales tried, the
            fastest one within is chosen. 0.01 is one point of accuracy.
        target_flops: Instead: share of the FLOPs without dropping, in (0, 1]: the slowest scale found that stays below.
        score: See :func:`sweep_threshold_scale`.

    Returns:
        What was chosen, as measured; its ``score`` is None if a batch has no labels.

    Raises:
        ValueError: If not exactly one goal is given, it is out of range or cannot be reached (the message has the
            range that can), or for the reasons of :func:`sweep_threshold_scale`. The dial is then as it was.
    """
    if (max_drop is None) == (target_flops is None):
        raise ValueError(
            f"max_drop={max_drop} and target_flops={target_flops}: give exactly one, the loss of score that is "
            "acceptable or the share of FLOPs to spend"
        )
    if max_drop is not None and not 0.0 <= max_drop < 1.0:
        raise ValueError(f"max_drop={max_drop} is outside [0, 1): 0.01 is one point of accuracy")
    if target_flops is not None and not 0.0 < target_flops <= 1.0:
        raise ValueError(f"target_flops={target_flops} is outside (0, 1]: 0.5 halves the FLOPs")
    trial = Trial(model, batches, score, needs_labels=max_drop is not None or score is not None)
    if max_drop is not None:
        chosen = _fastest_within(trial, max_drop)
    else:
        chosen = _slowest_below(trial, cast(float, target_flops))
    set_threshold_scale(model, chosen.scale)
    return chosen


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale={scale} must be finite and at least 0: 1 is as trained, larger drops more")


def _fastest_within(trial: Trial, max_drop: float) -> DialPoint:
    """Bisect the exponent of the scale, and take the best of all that was measured: scores need not fall steadily."""
    points = [trial.at(0.0)]
    least = score_of(points[0]) - max_drop - _NEGLIGIBLE
    low, high = _OCTAVES
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        points.append(trial.at(2.0**middle))
        low, high = (middle, high) if score_of(points[-1]) >= least else (low, middle)
    return min((point for point in points if score_of(point) >= least), key=_cost)


def _cost(point: DialPoint) -> tuple[float, float]:
    return point.flops_ratio, point.scale


def _slowest_below(trial: Trial, target: float) -> DialPoint:
    """Bisect the exponent of the scale."""
    slowest, fastest = trial.at(0.0), trial.at(2.0 ** _OCTAVES[1])
    if slowest.flops_ratio <= target:
        return slowest
    if fastest.flops_ratio > target:
        raise ValueError(
            f"target_flops={target} cannot be reached by the thresholds of this model: on these batches they reach "
            f"{fastest.flops_ratio:.3f} to {slowest.flops_ratio:.3f}; train with a smaller target_flops, or let tokens "
            "leave before more layers"
        )
    low, high, best = *_OCTAVES, fastest
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        point = trial.at(2.0**middle)
        if point.flops_ratio > target:
            low = middle
            continue
        high, best = middle, max(best, point, key=_cost)
        if point.flops_ratio >= _NEAR * target:
            break
    return best
