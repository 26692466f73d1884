"""When MultiExit happens: registered in setup, driven by the module's hooks, converted and calibrated at the end.

How a threshold is chosen is in :mod:`lightning_compress.runtime.exit_dial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.callbacks.session import session_of
from lightning_compress.callbacks.validation_dial import check_validation, validation_batches
from lightning_compress.methods.multi_exit import MultiExitConfig as Config
from lightning_compress.nn.exit_policy import ExitRuleName
from lightning_compress.nn.exit_router import ExitRouter
from lightning_compress.nn.multi_exit import Pooling
from lightning_compress.runtime.exit_dial import ExitPoint, OutOfReachError, choose_exit_threshold
from lightning_compress.runtime.trial import check_batch

__all__ = ["MultiExit"]


class MultiExit(CompressionCallback):
    """Put an exit after every layer, train all of them together, and let easy texts leave early.

    Each exit learns from the labels and from what the model's own head says, and each layer gets the mean of the
    gradients of the exits above it, so that no exit starves another. At the end of ``fit`` the encoder runs packed:
    texts that are sure enough leave for real, in batches, and the others go on. A decoder's exits share its final norm
    and head; nobody leaves there, but ``generate(assistant_early_exit=...)`` drafts with them.

    Args:
        exits: Layers after which there is an exit, from 0; after all but the last by default.
        rule: When a text leaves: ``"entropy"``, ``"max_prob"``, ``"margin"``, ``"patience"`` (as many exits in a row
            agree) or ``"learned"``. Numbers (regression) know only the last two.
        threshold: What the rule's measure is compared with. Without it and the next two nobody leaves, until
            ``lightning_compress.choose_exit_threshold`` or ``set_exit_threshold`` is called.
        target_flops: Choose the threshold when ``fit`` ends, on the trainer's validation data, whose batches are
            dicts with ``"labels"``: share of the FLOPs of all layers to spend, in (0, 1].
        max_drop: Instead: by how much the validation score may be below that of all layers, in [0, 1).
        normalized: Whether entropies are a share of that of equal probabilities, in [0, 1], instead of nats.
        tolerance: Of ``rule="patience"`` in regression: by how much two exits may differ that say the same, positive.
        pooling: What an exit reads: ``"mean"``, the mean over tokens without padding, or ``"cls"``, the first token.
        pooler: Whether each exit has a dense layer before its ``tanh``, like BERT's pooler.
        dropout: Probability of the dropout in exits, in [0, 1).
        label_weight: Weight of the exits' losses against the labels, at least 0; they are known where the model is
            called with ``labels``.
        final_weight: Weight of the exits' distances to what the model's own head says, at least 0.
        equilibrium: Whether each layer gets the mean of the gradients of the exits above it; otherwise their sum.
        warmup: Share of training over which the weights of the exits' losses grow from 0, in [0, 1).
        module: Dotted path of the transformer inside the LightningModule, where it cannot be found unaided.
        convert: Whether to put the packed engine in place when ``fit`` ends.

    Raises:
        ValueError: If an argument is outside its range, two ways to choose the threshold are given, or one that needs
            the converted model is with ``convert=False``.

    Paper: COST-EFF (arXiv 2210.15523).

    Example:
        >>> MultiExit(max_drop=0.01).config.rule
        'entropy'
    """

    def __init__(
        self,
        *,
        exits: Sequence[int] | None = Config.exits,
        rule: ExitRuleName = Config.rule,
        threshold: float | None = Config.threshold,
        target_flops: float | None = Config.target_flops,
        max_drop: float | None = Config.max_drop,
        normalized: bool = Config.normalized,
        tolerance: float = Config.tolerance,
        pooling: Pooling = Config.pooling,
        pooler: bool = Config.pooler,
        dropout: float = Config.dropout,
        label_weight: float = Config.label_weight,
        final_weight: float = Config.final_weight,
        equilibrium: bool = Config.equilibrium,
        warmup: float = Config.warmup,
        module: str | None = None,
        convert: bool = True,
    ) -> None:
        config = Config(
            exits=exits,  # type: ignore[arg-type]
            rule=rule,
            threshold=threshold,
            target_flops=target_flops,
            max_drop=max_drop,
            normalized=normalized,
            tolerance=tolerance,
            pooling=pooling,
            pooler=pooler,
            dropout=dropout,
            label_weight=label_weight,
            final_weight=final_weight,
            equilibrium=equilibrium,
            warmup=warmup,
        )
        goals = {"target_flops": target_flops, "max_drop": max_drop}
        self._goal = {name: value for name, value in goals.items() if value is not None}
        self.chosen: ExitPoint | None = None
        """What ``target_flops`` or ``max_drop`` led to, as measured on the validation data."""
        if self._goal and not convert:
            raise ValueError(
                f"{next(iter(self._goal))} is measured on the converted model: leave convert=False out, or it"
            )
        super().__init__(config, module=module, convert=convert)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that there will be data to choose on."""
        if stage == "fit":
            for name, value in self._goal.items():
                check_validation(
                    trainer, f"{name}={value}", f"choose_exit_threshold(model, batches, {name}=...)"
                )
        super().setup(trainer, pl_module, stage)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any
    ) -> None:
        """Find out early, in the sanity check, whether batches can be scored."""
        if self._goal:
            check_batch(batch)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Convert, then choose the threshold."""
        super().on_fit_end(trainer, pl_module)
        session = session_of(pl_module)
        if session is None or session.compressor is None:
            return
        router = ExitRouter.on(session.compressor.model)
        if self._goal and router is not None:
            self.chosen = _choose(trainer, router, session.compressor.model, self._goal)
        elif router is not None and not router.rule.asked_layers():
            rank_zero_info(
                "the exits are trained, but nobody leaves by them yet: call lightning_compress.choose_exit_threshold("
                "model, batches, max_drop=...), or give MultiExit a threshold, target_flops or max_drop"
            )


def _choose(trainer: Trainer, router: ExitRouter, model: Any, goal: dict[str, float]) -> ExitPoint | None:
    """Choose on the first process's part of the validation data, for all processes."""
    trainer.fit_loop.epoch_loop.val_loop.setup_data()  # does nothing where validation ran
    chosen, rule = None, router.rule
    if trainer.is_global_zero:
        chosen = _choose_here(trainer, model, goal)
    settings = dict(rule.named_buffers())
    for name, buffer in trainer.strategy.broadcast(settings).items():
        settings[name].copy_(buffer)
    return chosen


def _choose_here(trainer: Trainer, model: Any, goal: dict[str, float]) -> ExitPoint | None:
    """Choose and set the threshold; where the goal is out of reach nobody leaves, and training is not lost."""
    with trainer.precision_plugin.forward_context():
        try:
            chosen = choose_exit_threshold(
                model,
                validation_batches(trainer),
                max_drop=goal.get("max_drop"),
                target_flops=goal.get("target_flops"),
            )
        except OutOfReachError as error:
            rank_zero_warn(f"{error}. Nobody leaves until lightning_compress.set_exit_threshold says so")
            return None
    wish = " and ".join(f"{name}={value}" for name, value in goal.items())
    rank_zero_info(
        f"{wish}: the threshold of the exits is {chosen.threshold:.3g}, which scores {chosen.score:.4f} with "
        f"{chosen.flops_ratio:.1%} of the FLOPs"
    )
    return chosen
