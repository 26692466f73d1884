"""What is minimised: free functions first, mixins for users with an objective of their own last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_compress.losses import (
    block_quantization,
    bottleneck_token_dropping,
    contribution_token_dropping,
    distillation,
    multi_exit,
    soft_threshold_rank,
    width_slimming,
)
from lightning_compress.losses.base import LossMixin
from lightning_compress.losses.block_quantization import BlockQuantizationLossMixin
from lightning_compress.losses.bottleneck_token_dropping import BottleneckTokenDroppingLossMixin
from lightning_compress.losses.contribution_token_dropping import ContributionTokenDroppingLossMixin
from lightning_compress.losses.distillation import DistillationLossMixin
from lightning_compress.losses.information_bottleneck import InformationBottleneckLossMixin
from lightning_compress.losses.multi_exit import MultiExitLossMixin
from lightning_compress.losses.soft_threshold_rank import SoftThresholdRankLossMixin
from lightning_compress.losses.width_slimming import WidthSlimmingLossMixin

__all__ = [
    "TASK_TERMS",
    "TERMS",
    "BlockQuantizationLossMixin",
    "BottleneckTokenDroppingLossMixin",
    "ContributionTokenDroppingLossMixin",
    "DistillationLossMixin",
    "InformationBottleneckLossMixin",
    "LossMixin",
    "MultiExitLossMixin",
    "SoftThresholdRankLossMixin",
    "WidthSlimmingLossMixin",
]

TERMS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "width_slimming": width_slimming.terms,
    "soft_threshold_rank": soft_threshold_rank.terms,
    "contribution_token_dropping": contribution_token_dropping.terms,
    "bottleneck_token_dropping": bottleneck_token_dropping.terms,
    "multi_exit": multi_exit.terms,
    "block_quantization": block_quantization.terms,
    "distillation": distillation.terms,
}
"""The terms of each method, as functions of its handle."""

TASK_TERMS = tuple(f"multi_exit/{name}" for name in multi_exit.TASK_TERMS)
"""Terms that are weighed with the task's own loss."""
