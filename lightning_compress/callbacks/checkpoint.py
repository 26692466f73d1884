"""Checkpoints that wait for the target: "best" is chosen only among models that are small enough."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_compress.callbacks.session import session_of

__all__ = ["CompressedModelCheckpoint"]


class CompressedModelCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that saves nothing before every method meets its target.

    A plain checkpoint with ``monitor="val/acc"`` keeps the largest model as the best one: it was saved before
    anything was compressed. Takes the arguments of ``ModelCheckpoint``. To be able to resume from the time before
    the target, add a plain ``ModelCheckpoint`` beside it.

    Args:
        **settings: Arguments of ``lightning.pytorch.callbacks.ModelCheckpoint``.

    Example:
        >>> CompressedModelCheckpoint(monitor="val/acc", mode="max").monitor
        'val/acc'
    """

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save as usual once on target."""
        if _is_on_target(pl_module):
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save as usual once on target."""
        if _is_on_target(pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save as usual once on target."""
        if _is_on_target(pl_module):
            super().on_validation_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save as usual once on target; otherwise say that nothing was saved."""
        if _is_on_target(pl_module):
            super().on_train_end(trainer, pl_module)
        elif session_of(pl_module) is not None:
            rank_zero_warn(
                "CompressedModelCheckpoint saved nothing: training ended before the target was met. Train longer, or "
                "lower search_end so that ranks are pinned earlier"
            )


def _is_on_target(module: LightningModule) -> bool:
    session = session_of(module)
    return session is None or session.compressor is None or session.compressor.is_on_target
