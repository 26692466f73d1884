"""One row per method: its identity setting, a compressing setting, and the callback with the latter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_compress.callbacks import (
    BlockQuantization,
    BottleneckTokenDropping,
    CompressionCallback,
    ContributionTokenDropping,
    Distillation,
    MultiExit,
    SoftThresholdRank,
    WidthSlimming,
)
from lightning_compress.methods import MethodConfig
from lightning_compress.methods.block_quantization import BlockQuantizationConfig
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.methods.distillation import DistillationConfig
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.methods.width_slimming import WidthSlimmingConfig

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """What generic tests need to know of a method."""

    identity: MethodConfig
    """Settings under which nothing is compressed, or, of bits, nothing before the model is converted."""
    compressing: MethodConfig
    """Settings under which the tiny BERT of ``tests.toys`` shrinks."""
    callback: Callable[[], CompressionCallback]
    """Makes the callback with the compressing settings."""
    shrinks: Literal["parameters", "tokens", "bits", "nothing"] = "parameters"
    """What there is less of afterwards."""
    refuses: tuple[str, ...] = ()
    """Methods that do the same job otherwise, and do not run beside it."""


CASES: dict[str, Case] = {
    "width_slimming": Case(
        identity=WidthSlimmingConfig(target_params=1.0),
        compressing=WidthSlimmingConfig(heads=2, ffn=0.5, embedding_rank=12),
        callback=lambda: WidthSlimming(heads=2, ffn=0.5, embedding_rank=12),
    ),
    "soft_threshold_rank": Case(
        identity=SoftThresholdRankConfig(target_params=1.0, rank_multiple=4),
        compressing=SoftThresholdRankConfig(target_params=0.5, rank_multiple=4),
        callback=lambda: SoftThresholdRank(target_params=0.5, rank_multiple=4),
    ),
    "contribution_token_dropping": Case(
        identity=ContributionTokenDroppingConfig(target_flops=1.0, warmup=0.5),
        compressing=ContributionTokenDroppingConfig(target_tokens=0.6, warmup=0.2, threshold_init=0.99),
        callback=lambda: ContributionTokenDropping(target_tokens=0.6, warmup=0.2, threshold_init=0.99),
        shrinks="tokens",
        refuses=("bottleneck_token_dropping",),
    ),
    "bottleneck_token_dropping": Case(
        identity=BottleneckTokenDroppingConfig(target_flops=1.0),
        compressing=BottleneckTokenDroppingConfig(removal_weight=9.0, warmup=0.0, sampler_lr=0.05),
        callback=lambda: BottleneckTokenDropping(removal_weight=9.0, warmup=0.0, sampler_lr=0.05),
        shrinks="tokens",
        refuses=("contribution_token_dropping",),
    ),
    "multi_exit": Case(
        identity=MultiExitConfig(),
        compressing=MultiExitConfig(threshold=0.68, dropout=0.0),
        callback=lambda: MultiExit(threshold=0.68, dropout=0.0),
        shrinks="tokens",
    ),
    "block_quantization": Case(
        identity=BlockQuantizationConfig(),
        compressing=BlockQuantizationConfig(operators=("all",), start=0.2, ramp_end=0.5),
        callback=lambda: BlockQuantization(operators="all", start=0.2, ramp_end=0.5),
        shrinks="bits",
    ),
    "distillation": Case(
        identity=DistillationConfig(),
        compressing=DistillationConfig(start=0.3, hidden_first=0.3, hidden_weight=0.1, logit_weight=0.1),
        callback=lambda: Distillation(start=0.3, hidden_first=0.3, hidden_weight=0.1, logit_weight=0.1),
        shrinks="nothing",
    ),
}
