"""The threshold of exits: chosen on data after training, for a loss of score or a share of the FLOPs; changed at will.

It is a buffer of the model's exit rule, part of the model's state, so what is chosen is saved. One pass over the data
tells what every threshold would give (:mod:`lightning_compress.runtime.exit_trial`); which exits are asked is chosen
with it, since asking costs time. The next chapter is :mod:`lightning_compress.runtime.static`.

Shape legend: K exits before the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from lightning_compress.nn.anatomy import find_transformer
from lightning_compress.nn.exit_policy import ExitRule
from lightning_compress.runtime.exit_trial import ExitPoint, ExitTrial
from lightning_compress.runtime.packing import packed_encoder
from lightning_compress.runtime.trial import Batch, Score, score_of

__all__ = [
    "MIN_SHARE",
    "ExitPoint",
    "OutOfReachError",
    "choose_exit_threshold",
    "exit_rule_of",
    "exit_threshold",
    "set_exit_threshold",
    "sweep_exit_threshold",
]

MIN_SHARE = 0.02
"""An exit that fewer of the examples use is not worth asking: asking one costs 2.3 % of a layer in batches of 32 texts
of 32 tokens, 3.4 % in batches of 8, and 12 % for a single one (MiniLM's shape, one thread, fp32: measured by
``benchmarks/exits.py``)."""

_TRIED = 200
"""Thresholds whose scores are compared."""
_SWEPT = 20
"""Thresholds of a sweep where none are given."""
_NEGLIGIBLE = 1e-9


class OutOfReachError(ValueError):
    """No threshold of a model's exits spends as little as was asked for."""


_Find = Callable[[tuple[int, ...]], ExitPoint | None]


def exit_rule_of(model: nn.Module) -> ExitRule:
    """Return the rule by which examples leave a model, packed or in training form.

    Raises:
        ValueError: If the model has no exits.
    """
    encoder = packed_encoder(model)
    if encoder is not None and encoder.exits is not None:
        return encoder.exits.rule
    rule = getattr(find_transformer(model)[1], "exit_rule", None)
    if not isinstance(rule, ExitRule):
        raise ValueError(
            f"{type(model).__name__} has no exits by which examples leave: train it with MultiExit"
        )
    return rule


def exit_threshold(model: nn.Module) -> float:
    """Return the threshold of a model's exits.

    Raises:
        ValueError: If the model has no exits.
    """
    return float(exit_rule_of(model).threshold)


def set_exit_threshold(
    model: nn.Module, threshold: float | None, *, exits: Sequence[int] | None = None
) -> None:
    """Let more or fewer examples leave early, without training.

    Args:
        model: A model with exits, or a module that holds one.
        threshold: In the unit of the rule, see :mod:`lightning_compress.nn.exit_rules`; None lets nobody leave early.
        exits: Layers whose exits are asked, from 0; None leaves that as it is. Patience asks all of them.

    Raises:
        ValueError: If the model has no exits, the threshold is out of range, or a layer has no exit.
    """
    rule = exit_rule_of(model)
    threshold = rule.checked(rule.off if threshold is None else threshold)
    unknown = sorted(set(exits or ()) - set(rule.layers))
    if unknown:
        raise ValueError(
            f"exits={list(exits or ())} names layers {unknown}, but exits are after {list(rule.layers)}"
        )
    if rule.looks_back and exits is not None and set(exits) != set(rule.layers):
        raise ValueError(
            f"exits={list(exits)}: this rule compares each exit with those before it, so it asks all of "
            f"{list(rule.layers)}; leave exits out"
        )
    with torch.no_grad():
        rule.threshold.fill_(threshold)
        if exits is not None:
            asked = [layer in exits for layer in rule.layers]
            rule.is_checked_K.copy_(torch.tensor(asked, dtype=torch.bool))


def sweep_exit_threshold(
    model: nn.Module,
    batches: Iterable[Batch],
    thresholds: Iterable[float] | None = None,
    *,
    score: Score | None = None,
) -> list[ExitPoint]:
    """Measure a model with exits at several thresholds, and leave its own as it was.

    Args:
        model: A model with exits that runs packed, or a module that holds one.
        batches: Keyword arguments of the model with ``"labels"``, such as a data loader yields. Other entries that
            the model does not take are left out. They are run once.
        thresholds: Thresholds to measure; None takes 20, from nobody to everybody, by the share that leaves.
        score: Of logits and labels, larger is better. None is the accuracy of classifiers, and Pearson's correlation
            of models with one output.

    Returns:
        One point per threshold, in the order given, with the exits that the model asks.

    Raises:
        ValueError: If the model does not run packed or has no exits, a threshold is out of range, or there is no data
            or no label.
    """
    trial = ExitTrial(model, batches, score)
    asked = trial.rule.checked_layers()
    if thresholds is None:
        thresholds = trial.thresholds(asked, _SWEPT)
    return [trial.at(trial.rule.checked(threshold), asked) for threshold in thresholds]


def choose_exit_threshold(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    max_drop: float | None = None,
    target_flops: float | None = None,
    score: Score | None = None,
    min_share: float = MIN_SHARE,
) -> ExitPoint:
    """Find the threshold that does what is wanted on a data set, and set it; exits that too few use are asked no more.

    Args:
        model: A model with exits that runs packed, or a module that holds one.
        batches: See :func:`sweep_exit_threshold`; data that the model was not trained on. For ``target_flops`` they
            need no ``"labels"``, unless ``score`` is given.
        max_drop: By how much the score may be below that of all layers, in [0, 1): of 200 thresholds, the fastest one
            within is chosen. 0.01 is one point of accuracy.
        target_flops: Instead: share of the FLOPs of all layers, in (0, 1]: the slowest threshold that stays below.
        score: See :func:`sweep_exit_threshold`.
        min_share: Share of the examples, in [0, 1), that has to leave by an exit, or it is not asked. A rule that
            looks back asks all.

    Returns:
        What was chosen, as measured; its ``score`` is None if a batch has no labels.

    Raises:
        OutOfReachError: If ``target_flops`` cannot be reached; the message says what can.
        ValueError: If not exactly one goal is given, it is out of range, or for the reasons of
            :func:`sweep_exit_threshold`. The threshold is then as it was.
    """
    _check_goal(max_drop, target_flops, min_share)
    trial = ExitTrial(model, batches, score, needs_labels=max_drop is not None or score is not None)

    def find(asked: tuple[int, ...]) -> ExitPoint | None:
        if target_flops is not None:
            return _slowest_below(trial, target_flops, asked)
        assert max_drop is not None
        return _fastest_within(trial, max_drop, asked)

    chosen = find(trial.layers)
    if chosen is None:
        fastest = trial.at(trial.thresholds(trial.layers)[-1])
        raise OutOfReachError(
            f"target_flops={target_flops} cannot be reached by the exits of this model: on these batches they reach "
            f"{fastest.flops_ratio:.3f}, with everybody leaving as early as the rule allows; put an exit after an "
            "earlier layer"
        )
    chosen = _without_rare(trial, chosen, find, min_share)
    set_exit_threshold(
        model, chosen.threshold, exits=None if trial.rule.looks_back else chosen.exits or trial.layers
    )
    return chosen


def _check_goal(max_drop: float | None, target_flops: float | None, min_share: float) -> None:
    if (max_drop is None) == (target_flops is None):
        raise ValueError(
            f"max_drop={max_drop} and target_flops={target_flops}: give exactly one, the loss of score that is "
            "acceptable or the share of FLOPs to spend"
        )
    if max_drop is not None and not 0.0 <= max_drop < 1.0:
        raise ValueError(f"max_drop={max_drop} is outside [0, 1): 0.01 is one point of accuracy")
    if target_flops is not None and not 0.0 < target_flops <= 1.0:
        raise ValueError(f"target_flops={target_flops} is outside (0, 1]: 0.5 halves the FLOPs")
    if not 0.0 <= min_share < 1.0:
        raise ValueError(f"min_share={min_share} is outside [0, 1): 0.02 is one example of 50")


def _without_rare(trial: ExitTrial, chosen: ExitPoint, find: _Find, min_share: float) -> ExitPoint:
    """Leave out the least used exit, and look again, until all are used enough or the goal would be missed."""
    while chosen.exits and not trial.rule.looks_back:
        rarest = min(chosen.exits, key=lambda layer: chosen.leaves_L[layer])
        if chosen.leaves_L[rarest] >= min_share:
            break
        found = find(tuple(layer for layer in chosen.exits if layer != rarest))
        if found is None:
            break
        chosen = found
    return chosen


def _fastest_within(trial: ExitTrial, max_drop: float, asked: tuple[int, ...]) -> ExitPoint:
    """Take the best of all thresholds that are tried: scores need not fall steadily."""
    points = [trial.at(threshold, asked) for threshold in trial.thresholds(asked, _TRIED)]
    least = score_of(points[0]) - max_drop - _NEGLIGIBLE
    return min((point for point in points if score_of(point) >= least), key=lambda point: point.flops_ratio)


def _slowest_below(trial: ExitTrial, target: float, asked: tuple[int, ...]) -> ExitPoint | None:
    """Bisect: the further the threshold, the earlier everybody leaves. The first lets nobody, and is no bargain."""
    thresholds = trial.thresholds(asked)
    off = trial.at(thresholds[0], asked)
    if off.flops_ratio <= target:
        return off
    low, high, best = 1, len(thresholds) - 1, None
    while low <= high:
        middle = (low + high) // 2
        point = trial.at(thresholds[middle], asked)
        if point.flops_ratio <= target:
            best, high = point, middle - 1
        else:
            low = middle + 1
    return best
