"""When things happen: the only layer, with the command line, data and tasks, that knows Lightning."""

from lightning_compress.callbacks.base import CompressionCallback, CompressionMixin, convert
from lightning_compress.callbacks.bottleneck_token_dropping import BottleneckTokenDropping
from lightning_compress.callbacks.checkpoint import CompressedModelCheckpoint
from lightning_compress.callbacks.contribution_token_dropping import ContributionTokenDropping
from lightning_compress.callbacks.report import CompressionReport
from lightning_compress.callbacks.soft_threshold_rank import SoftThresholdRank

__all__ = [
    "BottleneckTokenDropping",
    "CompressedModelCheckpoint",
    "CompressionCallback",
    "CompressionMixin",
    "CompressionReport",
    "ContributionTokenDropping",
    "SoftThresholdRank",
    "convert",
]
