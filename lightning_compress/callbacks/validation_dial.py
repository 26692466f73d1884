"""Setting the dial of a token-dropping model on the trainer's validation data, at the end of fit.

What the dial is and how a setting is looked for is in :mod:`lightning_compress.runtime.dial`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info

from lightning_compress.callbacks.session import session_of
from lightning_compress.runtime.dial import DialPoint, choose_threshold_scale, set_threshold_scale

__all__ = ["check_validation", "choose_on_validation_data"]


def check_validation(trainer: Trainer, max_drop: float) -> None:
    """Refuse a run without the validation data on which the scale is to be chosen.

    Raises:
        ValueError: If there is no validation loader, no ``validation_step``, or no validation batches are allowed.
    """
    if not trainer.enable_validation:
        raise ValueError(
            f"max_drop={max_drop} is measured on validation data when training ends, but the run has none: give fit a "
            "validation loader and the module a validation_step, leave limit_val_batches above 0, or leave max_drop "
            "out and call lightning_compress.choose_threshold_scale(model, batches, max_drop=...) afterwards"
        )


def choose_on_validation_data(trainer: Trainer, module: LightningModule, max_drop: float) -> DialPoint | None:
    """Choose the scale of the thresholds on the first process's part of the validation data, for all processes.

    Returns:
        What was chosen, as measured; None on other processes than the first.

    Raises:
        ValueError: If batches are no dicts with labels.
    """
    session = session_of(module)
    assert session is not None and session.compressor is not None, "setup registers the method"
    model = session.compressor.model
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # does nothing where validation ran
    chosen = None
    if trainer.is_global_zero:
        with trainer.precision_plugin.forward_context():
            chosen = choose_threshold_scale(model, _batches(trainer), max_drop=max_drop)
        rank_zero_info(
            f"max_drop={max_drop}: the thresholds are scaled by {chosen.scale:.3g}, which scores {chosen.score:.4f} "
            f"with {chosen.flops_ratio:.1%} of the FLOPs"
        )
    scale = trainer.strategy.broadcast(None if chosen is None else chosen.scale)
    assert scale is not None
    set_threshold_scale(model, scale)
    return chosen


def _batches(trainer: Trainer) -> Iterator[Any]:
    loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
    for index, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=True)):
        limit = None if limit == float("inf") else int(limit)
        for batch in islice(loader, limit):
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)
