"""Metrics that add up over a data set and over processes."""

from lightning_compress.metrics.exit_depth import ExitDepth
from lightning_compress.metrics.rationale_agreement import RationaleAgreement
from lightning_compress.metrics.speedup import Speedup
from lightning_compress.metrics.tokens_kept import TokensKept

__all__ = ["ExitDepth", "RationaleAgreement", "Speedup", "TokensKept"]
