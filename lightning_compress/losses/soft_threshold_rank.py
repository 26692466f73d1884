"""What SoftThresholdRank minimises beside the task loss: a pressure on the thresholds.

Shape legend: K layers, M full rank of a layer. The next chapter is
:mod:`lightning_compress.callbacks.soft_threshold_rank`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.losses.base import LossMixin

__all__ = ["SoftThresholdRankLossMixin", "expected_size", "size_over_budget", "threshold_decay", "terms"]

_DEFAULT_WEIGHT = {"target": 1.0, "exp": 0.1}


def threshold_decay(alphas: Iterable[Tensor]) -> Tensor:
    """Return ``sum_k exp(-alpha_k)``: large while thresholds are low, with no target of its own.

    Paper: STAR-KV official code (``train.py``), the compression loss of SoftLMs' successor.

    Example:
        >>> threshold_decay([torch.tensor(0.0), torch.tensor(0.0)])
        tensor(2.)
    """
    return torch.stack([torch.exp(-alpha) for alpha in alphas]).sum()


def expected_size(
    sigmas: Sequence[Tensor],
    alphas: Sequence[Tensor],
    scales: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    sharpness: float,
) -> Tensor:
    """Return the differentiable number of weights, ``sum_k min(R_k (i_k + o_k), i_k o_k)``.

    The rank is ``R_k = sum_j sigmoid(s (sigma_kj / scale_k - alpha_k))``. Where the dense form is cheaper the value
    is capped but the gradient is not, so that a layer at full rank still feels the pressure.

    Args:
        sigmas: Singular values of each layer, shape ``[M]``; treated as constants.
        alphas: Threshold of each layer, scalar.
        scales: Unit of each threshold, scalar.
        shapes: ``(in, out)`` of each layer.
        sharpness: Slope ``s``.

    Departs from the paper: STAR-KV counts hard ranks and has no gradient through the size; this smooth count follows
    the log-ratio objective of adaptive rank selection (ARS).
    """
    sizes = []
    for sigma_M, alpha, scale, (inputs, outputs) in zip(sigmas, alphas, scales, shapes, strict=True):
        rank = torch.sigmoid(sharpness * (sigma_M.detach() / scale - alpha)).sum()
        raw = rank * (inputs + outputs)
        sizes.append(raw - (raw - inputs * outputs).clamp_min(0.0).detach())
    return torch.stack(sizes).sum()


def size_over_budget(size: Tensor, budget: float) -> Tensor:
    """Return ``log(max(size / budget, 1))``: zero within the budget.

    Example:
        >>> size_over_budget(torch.tensor(50.0), budget=100.0)
        tensor(0.)
    """
    return torch.log((size / budget).clamp_min(1.0))


def terms(handle: Any) -> dict[str, Tensor]:
    """Return the weighted terms of a prepared SoftThresholdRank handle; none outside the search."""
    if handle.phase != "search":
        return {}
    config, layers = handle.config, list(handle.layers.values())
    weight = (
        _DEFAULT_WEIGHT[config.regularizer]
        if config.regularizer_weight is None
        else config.regularizer_weight
    )
    alphas = [layer.alpha for layer in layers]
    if config.regularizer == "exp":
        return {"threshold_decay": weight * threshold_decay(alphas)}
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    sigmas, scales = [layer.sigma_M for layer in layers], [layer.scale for layer in layers]
    size = expected_size(sigmas, alphas, scales, shapes, config.sharpness) + handle.adapter_size
    return {"size_over_budget": weight * size_over_budget(size, handle.scheduled_budget)}


class SoftThresholdRankLossMixin(LossMixin):
    """For modules with an objective of their own that want to place SoftThresholdRank's term themselves."""

    def rank_loss(self) -> Tensor | float:
        """Return the weighted pressure on the thresholds for this step; 0 outside the search."""
        return sum(self.compression_terms("soft_threshold_rank").values(), start=0.0)
