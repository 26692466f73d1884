"""What Distillation minimises beside the task loss: the distance to a teacher's hidden states and predictions.

Shape legend: B batch, T padded length, D hidden size, C classes. The next chapter is
:mod:`lightning_compress.callbacks.distillation`.

Paper: COST-EFF (arXiv 2210.15523), equations after its official code, specification §2.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_compress.losses.base import LossMixin
from lightning_compress.nn.distillation import Lesson
from lightning_compress.nn.soft_label_loss import prediction_distance

__all__ = [
    "DistillationLossMixin",
    "hidden_state_distance",
    "representation_loss",
    "terms",
]


def hidden_state_distance(student_BTD: Tensor, teacher_BTD: Tensor, weight_BT: Tensor) -> Tensor:
    """Return ``mean_b (1 / n_b) sum_t m_bt (1 / D) ||h^S_bt - h^T_bt||^2`` with ``n_b = sum_t m_bt``.

    Padding, whose weight is 0, changes nothing, whatever its states are; a text without any weight counts as 0.

    Args:
        student_BTD: States of the student.
        teacher_BTD: States of the teacher at the same places; a constant.
        weight_BT: How much each token counts, ``m``: bool, or in [0, 1] where tokens leave softly.

    Paper: specification §2.1, one summand of ``L_rep``.

    Example:
        >>> student_BTD = torch.tensor([[[1.0, 1.0], [9.0, 9.0]]])
        >>> hidden_state_distance(student_BTD, torch.zeros(1, 2, 2), torch.tensor([[1, 0]]))
        tensor(1.)
    """
    weight_BT = weight_BT.detach().float()
    apart_BTD = student_BTD.float() - teacher_BTD.detach().float()
    apart_BTD = apart_BTD.masked_fill((weight_BT == 0).unsqueeze(-1), 0.0)  # whatever padding holds
    total_B = (weight_BT * apart_BTD.pow(2).mean(dim=-1)).sum(dim=1)
    return (total_B / weight_BT.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def representation_loss(states: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return ``L_rep``, the sum of :func:`hidden_state_distance` over triples of student, teacher and weight.

    Paper: specification §2.1; the embeddings are the first triple, then the layers that are paired.
    """
    return torch.stack([hidden_state_distance(*triple) for triple in states]).sum()


def terms(handle: Any) -> dict[str, Tensor]:
    """Return the weighted terms of a prepared Distillation handle; none before it starts.

    While only hidden states are trained on, the logit term is there with value and gradient 0, so that processes that
    wait for every gradient (DDP) get one of the heads.
    """
    lesson: Lesson | None = handle.lesson()
    if lesson is None:
        return {}
    config, weighted = handle.config, {}
    if lesson.states:
        weighted["hidden"] = config.hidden_weight * representation_loss(lesson.states)
    if lesson.logits:
        kind, tau = handle.prediction, config.temperature
        distances = [prediction_distance(s, t, kind, tau, lesson.weight) for s, t in lesson.logits]
        weighted["logit"] = handle.logit_weight * torch.stack(distances).sum()
    return weighted


class DistillationLossMixin(LossMixin):
    """For modules with an objective of their own that want to place the terms themselves."""

    def distillation_loss(self) -> Tensor | float:
        """Return the weighted distance to the teacher for this step; 0 before distillation starts."""
        return sum(self.compression_terms("distillation").values(), start=0.0)
