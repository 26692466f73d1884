"""What the report says of exits, measured on validation texts once the model is converted.

:mod:`lightning_compress.callbacks.report` asks; :mod:`lightning_compress.report.exit_record` is what it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_compress.compressor import Compressor
from lightning_compress.report import ExitsRecord
from lightning_compress.runtime import packed_encoder
from lightning_compress.runtime.exit_trial import ExitTrial
from lightning_compress.runtime.trial import is_regression

__all__ = ["ExitMeasurement", "has_exits", "measure_exits"]


class ExitMeasurement(NamedTuple):
    """What validation texts cost that may leave early, and where they left."""

    record: ExitsRecord
    dense_flops: float
    """Of a text, on average, without compression."""
    flops: float
    """Of a text, on average, as it left; the last layer counted for every token, as in the target."""


def has_exits(compressor: Compressor) -> bool:
    """Whether the run trains exits."""
    return any(record.method == "multi_exit" for record in compressor.plan.methods)


def measure_exits(
    model: nn.Module, dense: nn.Module, batches: Sequence[Mapping[str, Tensor]]
) -> ExitMeasurement | None:
    """Run a converted model over texts and note who leaves where; None if it has no exits, or there is no text.

    Args:
        model: The transformers model; runs where it is, in evaluation mode, without gradients.
        dense: The dense model, maybe on the meta device; for its costs.
        batches: Keyword arguments of the model, with ``labels`` where known.
    """
    encoder = packed_encoder(model)
    if encoder is None or encoder.exits is None or not batches:
        return None
    trial = ExitTrial(model, batches, needs_labels=False)
    dense_flops, metric = trial.dense_flops(dense), "correlation" if is_regression(model) else "accuracy"
    return ExitMeasurement(
        ExitsRecord.of(trial, metric, dense_flops), dense_flops, flops=trial.deployed().flops
    )
