"""When Distillation happens: registered in setup, driven by the module's hooks, gone at the end of fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.methods.distillation import DistillationConfig as Config
from lightning_compress.methods.teacher import MODULE, SELF

__all__ = ["Distillation"]


class Distillation(CompressionCallback):
    """Let a model learn what a teacher makes of the same texts: its hidden states, and its predictions.

    The teacher may be the model itself as it was when distillation began, which then holds up what other callbacks
    prune, factorise or drop; its exits teach the model's. Nothing of it is left in the model.

    Args:
        teacher: ``"self"``, the model itself as it is at ``start``, or folder or name of a fine-tuned model.
        teacher_model: The fine-tuned model itself instead; never saved, so to be given again when resuming.
        teacher_bits: Hold the teacher's linears in so many bits (bitsandbytes); by default as they are.
        hidden_weight: Weight of the distance between hidden states, at least 0; 0 for a teacher of another width or
            of fewer layers.
        logit_weight: Weight of the distance between predictions, exits included, at least 0.
        temperature: Temperature of the predictions that are compared, positive.
        task_weight: Weight of the task's own loss, and of what exits learn without the teacher, from ``start`` on.
        start: Share of training before distillation begins, in [0, 1).
        stages: Shares of training at which a stage begins, ascending; by default one stage from ``start`` on.
        hidden_first: Share of each stage, in [0, 1), that trains on hidden states alone.
        module: Dotted path of the transformer inside the LightningModule, where it cannot be found unaided.
        convert: Whether other methods make the model smaller when ``fit`` ends.

    Raises:
        ValueError: If an argument is outside its range, or two teachers are given.

    Paper: COST-EFF (arXiv 2210.15523).

    Example:
        >>> Distillation(start=0.3, task_weight=0.0).config.teacher
        'self'
    """

    def __init__(
        self,
        *,
        teacher: str = Config.teacher,
        teacher_model: nn.Module | None = None,
        teacher_bits: Literal[4, 8] | None = Config.teacher_bits,
        hidden_weight: float = Config.hidden_weight,
        logit_weight: float = Config.logit_weight,
        temperature: float = Config.temperature,
        task_weight: float = Config.task_weight,
        start: float = Config.start,
        stages: Sequence[float] | None = Config.stages,
        hidden_first: float = Config.hidden_first,
        module: str | None = None,
        convert: bool = True,
    ) -> None:
        if teacher_model is not None and teacher not in (SELF, MODULE):
            raise ValueError(f"teacher={teacher!r} and a teacher_model are two teachers: give one of them")
        config = Config(
            teacher=teacher if teacher_model is None else MODULE,
            teacher_bits=teacher_bits,
            hidden_weight=hidden_weight,
            logit_weight=logit_weight,
            temperature=temperature,
            task_weight=task_weight,
            start=start,
            stages=stages,  # type: ignore[arg-type]
            hidden_first=hidden_first,
        )
        resources = None if teacher_model is None else {"teacher_model": teacher_model}
        super().__init__(config, module=module, convert=convert, resources=resources)
