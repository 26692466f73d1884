"""Losses as loops over plain numbers, to hold the fast ones against."""

from __future__ import annotations

import math

from torch import Tensor


def slow_softmax(logits_C: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits_C)) for x in logits_C]
    return [p / sum(powers) for p in powers]


def slow_cross_entropy(logits_BC: Tensor, targets_BC: list[list[float]]) -> float:
    total = 0.0
    for logits_C, target_C in zip(logits_BC.tolist(), targets_BC, strict=True):
        log_C = [math.log(p) for p in slow_softmax(logits_C)]
        total -= sum(t * score for t, score in zip(target_C, log_C, strict=True))
    return total / len(targets_BC)


def one_hot(labels: list[int], count: int) -> list[list[float]]:
    return [[float(c == label) for c in range(count)] for label in labels]
