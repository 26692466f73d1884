"""What is minimised: free functions first, mixins for users with an objective of their own last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_compress.losses import (
    bottleneck_token_dropping,
    contribution_token_dropping,
    soft_threshold_rank,
)
from lightning_compress.losses.base import LossMixin
from lightning_compress.losses.bottleneck_token_dropping import BottleneckTokenDroppingLossMixin
from lightning_compress.losses.contribution_token_dropping import ContributionTokenDroppingLossMixin
from lightning_compress.losses.information_bottleneck import InformationBottleneckLossMixin
from lightning_compress.losses.soft_threshold_rank import SoftThresholdRankLossMixin

__all__ = [
    "TERMS",
    "BottleneckTokenDroppingLossMixin",
    "ContributionTokenDroppingLossMixin",
    "InformationBottleneckLossMixin",
    "LossMixin",
    "SoftThresholdRankLossMixin",
]

TERMS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "soft_threshold_rank": soft_threshold_rank.terms,
    "contribution_token_dropping": contribution_token_dropping.terms,
    "bottleneck_token_dropping": bottleneck_token_dropping.terms,
}
