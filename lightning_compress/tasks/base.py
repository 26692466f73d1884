"""What the two tasks share: a Hugging Face model built once, checked arguments, optimizer and schedule.

The next chapters are :mod:`lightning_compress.tasks.text_classifier` and
:mod:`lightning_compress.tasks.causal_language_model`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_compress.tasks.optimization import parameter_groups, warmup_then_decay

__all__ = ["TransformerTask"]


class TransformerTask(LightningModule, ABC):
    """A ``LightningModule`` around one transformers model, ``self.model``, made by ``configure_model``.

    A task that knows enough calls ``configure_model`` in its ``__init__``; Lightning calls it otherwise.

    Args:
        learning_rate: Peak learning rate, above 0.
        weight_decay: Decay of weight matrices, 0 or more.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises, in [0, 1).
        attention_dropout: Dropout of attention probabilities in [0, 1), or None for the model's own.

    Raises:
        ValueError: An argument is out of its range.
    """

    model: PreTrainedModel | None

    def __init__(
        self, learning_rate: float, weight_decay: float, warmup_ratio: float, attention_dropout: float | None
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be above 0, got {learning_rate}.")
        if weight_decay < 0:
            raise ValueError(f"`weight_decay` must be 0 or more, got {weight_decay}.")
        for name, value in (("warmup_ratio", warmup_ratio), ("attention_dropout", attention_dropout)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.attention_dropout = attention_dropout
        self.model = None

    @override
    def configure_model(self) -> None:
        """Build the model, once."""
        if self.model is None:
            self.model = self.build_model()
            self.model.train()

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """Build the Hugging Face model of this task; subclasses say how."""

    @override
    def forward(self, **inputs: Any) -> Any:
        """Run the model; returns its output object."""
        assert self.model is not None, "configure_model has not run"
        return self.model(**inputs)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, no decay on biases and norms; linear warm-up, then linear decay, per step."""
        optimizer = torch.optim.AdamW(parameter_groups(self, self.weight_decay), lr=self.learning_rate)
        num_steps = self.trainer.estimated_stepping_batches
        scheduler = warmup_then_decay(optimizer, num_steps, self.warmup_ratio)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def datamodule(self) -> Any:
        """The trainer's data module; None without a trainer or data module."""
        trainer = getattr(self, "_trainer", None)
        return getattr(trainer, "datamodule", None)
