"""What BottleneckTokenDropping minimises beside the task loss: the information that samplers let through.

The formulas are in :mod:`lightning_compress.losses.information_bottleneck`; here they are averaged over layers and
weighted. The next chapter is :mod:`lightning_compress.callbacks.bottleneck_token_dropping`.

Shape legend: B batch, T padded length, D hidden size, L layers.

Paper: Infor-Coef (arXiv 2305.12458), specification §2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.losses.base import is_validating
from lightning_compress.losses.information_bottleneck import (
    NORM_WEIGHTS,
    InformationBottleneckLossMixin,
    NormForm,
    kept_ratio,
    masked_norm,
    negative_entropy,
)
from lightning_compress.nn.bottleneck_token_dropping import ExpectedSurvival, SampledTokens
from lightning_compress.nn.tape import TokensKept

__all__ = [
    "SKIM_WEIGHT",
    "BottleneckTokenDroppingLossMixin",
    "entropy_penalty",
    "norm_penalty",
    "removal_weight",
    "skim_penalty",
    "terms",
]

SKIM_WEIGHT = 0.5
"""Transkimmer's weight on GLUE."""


def norm_penalty(samples: Sequence[SampledTokens], form: NormForm, detach_hidden: bool = False) -> Tensor:
    """Return the mean over layers of the norm of what is let through.

    Args:
        samples: Records of the latest pass, one per layer that decides.
        form: See :func:`~lightning_compress.losses.information_bottleneck.masked_norm`.
        detach_hidden: Whether states are constants, so that the norm falls by dropping alone.

    Paper: specification §2.2, ``L_norm``; states are not detached there.
    """

    def of(record: SampledTokens) -> Tensor:
        hidden_BTD = record.hidden_BTD.detach() if detach_hidden else record.hidden_BTD
        return masked_norm(hidden_BTD, record.keep_BT, record.real_BT, form)

    return _mean_over_layers(samples, of)


def entropy_penalty(samples: Sequence[SampledTokens]) -> Tensor:
    """Return the mean over layers of the negative entropy of decisions. Paper: specification §2.2, ``L_ent``."""
    return _mean_over_layers(samples, lambda record: negative_entropy(record.keep_BT, record.real_BT))


def skim_penalty(samples: Sequence[SampledTokens]) -> Tensor:
    """Return the mean over layers of the share of tokens that stay. Paper: Transkimmer, specification §3."""
    return _mean_over_layers(samples, lambda record: kept_ratio(record.keep_BT, record.real_BT))


def removal_weight(config: Any) -> float:
    """Return the weight of the term that drops tokens: the user's, or the published one for the form in use."""
    if config.removal_weight is not None:
        return config.removal_weight
    return SKIM_WEIGHT if config.objective == "skim" else NORM_WEIGHTS[config.form]


def terms(handle: Any) -> dict[str, Tensor]:
    """Return the weighted terms of a prepared BottleneckTokenDropping handle; none once decisions are those to deploy.

    The term that drops tokens rests in the warm-up; the entropy need not (``entropy_from_start``). What a target adds
    to the weight of the norm is a price on decisions alone: states that could shrink would pay it that way. In
    validation, where nothing is drawn, there are none.

    Raises:
        ValueError: If the encoder is in evaluation mode in a pass that is to be learned from.
    """
    if is_validating(handle.policy):
        return {}
    if not handle.policy.training:
        raise ValueError(
            "the encoder is in evaluation mode, in which decisions are not drawn and samplers learn nothing: call "
            "train() on the model before training_step; freeze weights with requires_grad_(False) instead"
        )
    config = handle.config
    samples: list[SampledTokens] = handle.tape.read(SampledTokens)
    _measure(handle, samples[0].real_BT.sum(dim=1))
    if handle.phase == "recovery":
        return {}
    weighted: dict[str, Tensor] = {}
    weight = removal_weight(config)
    if handle.phase == "search" and config.objective == "skim":
        weighted["skim"] = weight * handle.multiplier * skim_penalty(samples)
    elif handle.phase == "search":
        extra = (handle.multiplier - 1.0) * norm_penalty(samples, config.form, detach_hidden=True)
        weighted["norm"] = weight * (norm_penalty(samples, config.form, config.detach_hidden) + extra)
    if config.objective == "bottleneck" and (handle.phase == "search" or config.entropy_from_start):
        weighted["entropy"] = config.entropy_weight * entropy_penalty(samples)
    return weighted


@torch.no_grad()
def _measure(handle: Any, lengths_B: Tensor) -> None:
    """Note what the pass cost, and how tokens would become fewer if the threshold rose."""
    counts_BL = torch.stack([record.keep_BT.sum(dim=1) for record in handle.tape.read(TokensKept)], dim=1)
    expected = handle.tape.read(ExpectedSurvival)
    fewer = -torch.stack([record.slope_B for record in expected]).sum()
    count = torch.stack([record.count_B for record in expected]).sum()
    handle.goal.measure(handle.model, handle.progress, counts_BL, lengths_B, (fewer, count))


def _mean_over_layers(samples: Sequence[SampledTokens], term: Callable[[SampledTokens], Tensor]) -> Tensor:
    return torch.stack([term(record) for record in samples]).mean()


class BottleneckTokenDroppingLossMixin(InformationBottleneckLossMixin):
    """For modules with an objective of their own that want to place the terms themselves."""

    def bottleneck_loss(self) -> Tensor | float:
        """Return the weighted norm and entropy terms for this step; 0 where there are none."""
        return sum(self.compression_terms("bottleneck_token_dropping").values(), start=0.0)
