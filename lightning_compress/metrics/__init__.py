"""Metrics that add up over a data set and over processes."""

from lightning_compress.metrics.speedup import Speedup

__all__ = ["Speedup"]
