"""What the report says of exits, measured on validation texts once the model is converted.

:mod:`lightning_compress.callbacks.report` asks; :mod:`lightning_compress.report.exit_record` is what it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_compress.compressor import Compressor
from lightning_compress.report import ExitPointRecord, ExitsRecord
from lightning_compress.runtime import packed_encoder
from lightning_compress.runtime.exit_trial import ExitPoint, ExitTrial
from lightning_compress.runtime.trial import is_regression

__all__ = ["ExitMeasurement", "has_exits", "measure_exits"]

_CURVE = 20
"""Thresholds of the curve, beside the deployed one."""


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
    deployed, dense_flops, off = trial.deployed(), trial.dense_flops(dense), trial.rule.off
    record = ExitsRecord(
        num_texts=len(trial.lengths_B),
        leaves=deployed.leaves_L,
        asked=deployed.exits,
        rule=trial.rule.name,
        threshold=_told(deployed, off),
        metric="correlation" if is_regression(model) else "accuracy",
        curve=tuple(
            ExitPointRecord(
                threshold=_told(point, off),
                score=point.score,
                flops_ratio=point.flops / dense_flops,
                mean_depth=point.mean_depth,
            )
            for point in trial.curve(_CURVE)
            if point.score is not None
        ),
    )
    return ExitMeasurement(record, dense_flops, deployed.flops)


def _told(point: ExitPoint, off: float) -> float | None:
    return None if point.threshold == off else point.threshold
