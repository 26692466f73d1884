"""Setting the dial of a token-dropping model on the trainer's validation data, at the end of fit.

What the dial is and how a setting is looked for is in :mod:`lightning_compress.runtime.dial`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from typing_extensions import override

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.session import session_of
from lightning_compress.methods import MethodConfig
from lightning_compress.runtime.dial import DialPoint, choose_threshold_scale, set_threshold_scale
from lightning_compress.runtime.trial import check_batch

__all__ = ["TokenDroppingCallback", "check_validation", "choose_on_validation_data", "validation_batches"]


class TokenDroppingCallback(CompressionCallback):
    """What the callbacks of token dropping share: with ``max_drop`` the dial is set when ``fit`` ends.

    Args:
        config: Settings of the method.
        max_drop: By how much the validation score may be below that with nothing dropped; None leaves the dial alone.
        module: Dotted path of the transformer inside the LightningModule.
        convert: Whether to put the packed engine in place when ``fit`` ends.
        resources: What the method takes beside its settings.

    Raises:
        ValueError: If ``max_drop`` is with ``convert=False``.
    """

    def __init__(
        self,
        config: MethodConfig,
        max_drop: float | None,
        *,
        module: str | None,
        convert: bool,
        resources: Mapping[str, Any] | None = None,
    ) -> None:
        if max_drop is not None and not convert:
            raise ValueError(
                "max_drop is measured on the converted model: leave convert=False out, or max_drop"
            )
        self.max_drop = max_drop
        self.chosen: DialPoint | None = None
        """What ``max_drop`` led to, as measured on the validation data."""
        super().__init__(config, module=module, convert=convert, resources=resources)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that there will be data to choose on."""
        if stage == "fit" and self.max_drop is not None:
            check_validation(
                trainer, f"max_drop={self.max_drop}", "choose_threshold_scale(model, batches, max_drop=...)"
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        """Find out early, in the sanity check, whether batches can be scored."""
        if self.max_drop is not None:
            check_batch(batch)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert, then choose the scale of the thresholds."""
        super().on_fit_end(trainer, pl_module)
        if self.max_drop is not None:
            self.chosen = choose_on_validation_data(trainer, pl_module, self.max_drop)


def check_validation(trainer: Trainer, goal: str, instead: str) -> None:
    """Refuse a run without the validation data on which a threshold is to be chosen.

    Args:
        trainer: The trainer, in setup.
        goal: The argument that asks for it, such as ``"max_drop=0.01"``.
        instead: What of ``lightning_compress`` can be called after training.

    Raises:
        ValueError: If there is no validation loader, no ``validation_step``, or no validation batches are allowed.
    """
    if not trainer.enable_validation:
        raise ValueError(
            f"{goal} is measured on validation data when training ends, but the run has none: give fit a validation "
            f"loader and the module a validation_step, leave limit_val_batches above 0, or leave {goal.split('=')[0]} "
            f"out and call lightning_compress.{instead} afterwards"
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
            chosen = choose_threshold_scale(model, validation_batches(trainer), max_drop=max_drop)
        rank_zero_info(
            f"max_drop={max_drop}: the thresholds are scaled by {chosen.scale:.3g}, which scores {chosen.score:.4f} "
            f"with {chosen.flops_ratio:.1%} of the FLOPs"
        )
    scale = trainer.strategy.broadcast(None if chosen is None else chosen.scale)
    assert scale is not None
    set_threshold_scale(model, scale)
    return chosen


def validation_batches(trainer: Trainer) -> Iterator[Any]:
    """Yield the validation batches of a trainer whose loaders are set up, on its device."""
    loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
    for index, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=True)):
        limit = None if limit == float("inf") else int(limit)
        for batch in islice(loader, limit):
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)
