"""What loss mixins share: they ask the compressor on the module for terms, and mark them as taken.

A user with an objective of his own inherits a mixin and calls :meth:`LossMixin.total_loss`, or one named term, in
``training_step``; the automatic addition by the callback then steps aside for that step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["LossMixin", "TermSource", "is_validating"]


def is_validating(module: nn.Module) -> bool:
    """Whether a pass is only looked at: in evaluation mode and without gradients, as in ``validation_step``."""
    return not module.training and not torch.is_grad_enabled()


class TermSource(Protocol):
    """Where terms come from: the compressor, or a stand-in."""

    def take_loss_terms(self, stem: str | None = None) -> Mapping[str, Tensor]:
        """Return the weighted terms of all methods or of one, and mark them as taken for this step."""
        ...

    def take_task_weight(self) -> float:
        """Return the weight of the task's own loss, unless it or terms were taken in this step; 1 then."""
        ...


class LossMixin:
    """Gives a module access to the compression terms of the current step."""

    def compression_terms(self, stem: str | None = None) -> Mapping[str, Tensor]:
        """Return the weighted scalar loss terms by name (``<stem>/<term>``), of one method or of all.

        Raises:
            RuntimeError: If no compression callback is active on this module.
        """
        return self._term_source().take_loss_terms(stem)

    def total_loss(self, task_loss: Tensor) -> Tensor:
        """Return the task loss, weighed as the methods have it, plus every compression term of this step."""
        weight = self._term_source().take_task_weight()
        start = task_loss if weight == 1.0 else weight * task_loss
        return sum(self.compression_terms().values(), start=start)

    def _term_source(self) -> TermSource:
        compressor: TermSource | None = getattr(vars(self).get("_compression"), "compressor", None)
        if compressor is None:
            raise RuntimeError(
                f"{type(self).__name__} asks for compression terms, but no compression callback is active: add one, "
                "e.g. Trainer(callbacks=[SoftThresholdRank()])"
            )
        return compressor
