"""One row per method: its identity setting, a compressing setting, and the callback with the latter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_compress.callbacks import CompressionCallback, SoftThresholdRank
from lightning_compress.methods import MethodConfig
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """What generic tests need to know of a method."""

    identity: MethodConfig
    """Settings under which nothing is compressed."""
    compressing: MethodConfig
    """Settings under which the tiny BERT of ``tests.toys`` shrinks."""
    callback: Callable[[], CompressionCallback]
    """Makes the callback with the compressing settings."""


CASES: dict[str, Case] = {
    "soft_threshold_rank": Case(
        identity=SoftThresholdRankConfig(target_params=1.0, rank_multiple=4),
        compressing=SoftThresholdRankConfig(target_params=0.5, rank_multiple=4),
        callback=lambda: SoftThresholdRank(target_params=0.5, rank_multiple=4),
    ),
}
