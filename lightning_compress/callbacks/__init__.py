"""When things happen: the only layer, with the command line, data and tasks, that knows Lightning."""

from lightning_compress.callbacks.base import CompressionCallback, CompressionMixin, convert
from lightning_compress.callbacks.block_quantization import BlockQuantization
from lightning_compress.callbacks.bottleneck_token_dropping import BottleneckTokenDropping
from lightning_compress.callbacks.checkpoint import CompressedModelCheckpoint
from lightning_compress.callbacks.contribution_token_dropping import ContributionTokenDropping
from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.multi_exit import MultiExit
from lightning_compress.callbacks.report import CompressionReport
from lightning_compress.callbacks.soft_threshold_rank import SoftThresholdRank
from lightning_compress.callbacks.width_slimming import WidthSlimming

__all__ = [
    "BlockQuantization",
    "BottleneckTokenDropping",
    "CompressedModelCheckpoint",
    "CompressionCallback",
    "CompressionMixin",
    "CompressionReport",
    "ContributionTokenDropping",
    "Distillation",
    "MultiExit",
    "SoftThresholdRank",
    "WidthSlimming",
    "convert",
]
