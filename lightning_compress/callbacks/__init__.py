"""When things happen: the only layer, with the command line, data and tasks, that knows Lightning."""

from lightning_compress.callbacks.base import CompressionCallback, CompressionMixin, convert
from lightning_compress.callbacks.soft_threshold_rank import SoftThresholdRank

__all__ = ["CompressionCallback", "CompressionMixin", "SoftThresholdRank", "convert"]
