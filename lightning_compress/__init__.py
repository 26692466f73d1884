"""Compress transformers while they fine-tune, by adding a callback to a Lightning Trainer.

Importing this package registers the loader of compressed models with transformers and does not import Lightning;
names that need Lightning are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_compress._version import __version__
from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, load, plan_of, quantize, save_pretrained
from lightning_compress.losses import (
    BlockQuantizationLossMixin,
    BottleneckTokenDroppingLossMixin,
    ContributionTokenDroppingLossMixin,
    DistillationLossMixin,
    InformationBottleneckLossMixin,
    MultiExitLossMixin,
    SoftThresholdRankLossMixin,
    WidthSlimmingLossMixin,
)
from lightning_compress.methods.block_quantization import BlockQuantizationConfig
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.methods.distillation import DistillationConfig
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.methods.width_slimming import WidthSlimmingConfig
from lightning_compress.plan import CompressionPlan, PlanError
from lightning_compress.runtime import pack, unpack
from lightning_compress.runtime.backends import use_backend
from lightning_compress.runtime.dial import (
    choose_threshold_scale,
    set_threshold_scale,
    sweep_threshold_scale,
)
from lightning_compress.runtime.exit_dial import (
    choose_exit_threshold,
    set_exit_threshold,
    sweep_exit_threshold,
)

if TYPE_CHECKING:
    from lightning_compress.callbacks import (
        BlockQuantization,
        BottleneckTokenDropping,
        CompressedModelCheckpoint,
        CompressionMixin,
        CompressionReport,
        ContributionTokenDropping,
        Distillation,
        MultiExit,
        SoftThresholdRank,
        WidthSlimming,
        convert,
    )

__all__ = [
    "BlockQuantization",
    "BlockQuantizationConfig",
    "BlockQuantizationLossMixin",
    "BottleneckTokenDropping",
    "BottleneckTokenDroppingConfig",
    "BottleneckTokenDroppingLossMixin",
    "CompressedModelCheckpoint",
    "CompressionMixin",
    "CompressionPlan",
    "CompressionReport",
    "ContributionTokenDropping",
    "Compressor",
    "ContributionTokenDroppingConfig",
    "ContributionTokenDroppingLossMixin",
    "Distillation",
    "DistillationConfig",
    "DistillationLossMixin",
    "InformationBottleneckLossMixin",
    "MultiExit",
    "MultiExitConfig",
    "MultiExitLossMixin",
    "PlanError",
    "SoftThresholdRank",
    "SoftThresholdRankConfig",
    "SoftThresholdRankLossMixin",
    "WidthSlimming",
    "WidthSlimmingConfig",
    "WidthSlimmingLossMixin",
    "__version__",
    "attach_plan",
    "choose_exit_threshold",
    "choose_threshold_scale",
    "convert",
    "load",
    "pack",
    "plan_of",
    "quantize",
    "save_pretrained",
    "set_exit_threshold",
    "set_threshold_scale",
    "sweep_exit_threshold",
    "sweep_threshold_scale",
    "unpack",
    "use_backend",
]

_NEED_LIGHTNING = (
    "BlockQuantization",
    "BottleneckTokenDropping",
    "CompressedModelCheckpoint",
    "CompressionMixin",
    "CompressionReport",
    "ContributionTokenDropping",
    "Distillation",
    "MultiExit",
    "SoftThresholdRank",
    "WidthSlimming",
    "convert",
)


def __getattr__(name: str) -> Any:
    """Import what needs Lightning at its first use."""
    if name in _NEED_LIGHTNING:
        return getattr(import_module("lightning_compress.callbacks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, the late ones too."""
    return sorted(__all__)
