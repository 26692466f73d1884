"""What the report says of widths, counted once the model is converted.

:mod:`lightning_compress.callbacks.report` asks; :mod:`lightning_compress.report.width_record` is what it gets.
"""

from __future__ import annotations

from typing import Any

from lightning_compress.compressor import Compressor
from lightning_compress.methods.width_batches import PassClock
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import get_module
from lightning_compress.report import KeptOf, LayerWidth, WidthsRecord

__all__ = ["calibration_clock", "measure_widths"]

_STEM = "width_slimming"


def calibration_clock(compressor: Compressor) -> PassClock | None:
    """Return the clock of separate passes for importance; None where there are none, or all are over."""
    handle: Any = compressor.handles.get(_STEM)
    return handle.clock if handle is not None and handle.config.calibration_batches else None


def measure_widths(compressor: Compressor, clock: PassClock | None = None) -> WidthsRecord | None:
    """Count what is left of each layer of a converted model; None if its layers were not slimmed.

    Args:
        compressor: After the conversion.
        clock: Of the separate passes, if there were some.
    """
    record = next((record for record in compressor.plan.methods if record.method == _STEM), None)
    if record is None:
        return None
    model, dense = compressor.model, compressor.dense_skeleton()
    theirs = describe(dense)
    rank, table = record.structure["embedding_rank"], get_module(dense, theirs.word_embeddings)
    full_rank = int(table.weight.shape[1])  # type: ignore[union-attr]
    hidden = record.structure["hidden"]
    return WidthsRecord(
        layers=LayerWidth.of_layers(model, dense),
        criterion=str(record.config["criterion"]),
        embedding_rank=None if rank is None else KeptOf(rank, full_rank),
        hidden=None if hidden is None else KeptOf(hidden, theirs.hidden_size),
        calibration_seconds=None if clock is None else clock.seconds,
        calibration_share=None if clock is None else clock.share,
    )
