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
from lightning_compress.nn.distillation import Lesson, Prediction

__all__ = [
    "DistillationLossMixin",
    "hidden_state_distance",
    "prediction_distance",
    "representation_loss",
    "soft_cross_entropy",
    "terms",
]


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Return ``-tau^2 mean sum_c softmax(z^T / tau)_c log softmax(z^S / tau)_c``.

    Its gradient is that of the Kullback-Leibler divergence; its lowest value is the teacher's entropy.

    Args:
        student: Logits, ``[..., C]``.
        teacher: Logits of the same shape; a constant.
        temperature: ``tau``, positive.
        weight: How much each prediction counts, ``[...]``; all alike if None.

    Paper: specification §2.1, with ``tau = 1``.
    Departs from the paper: the official code has no factor ``tau^2``, which keeps gradients of one size (§6-B, A7).

    Example:
        >>> same = torch.zeros(1, 2)
        >>> soft_cross_entropy(same, same)  # ln 2
        tensor(0.6931)
    """
    target = (teacher.detach().float() / temperature).softmax(dim=-1)
    score = (student.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * _mean(-(target * score).sum(dim=-1), weight)


def prediction_distance(
    student: Tensor,
    teacher: Tensor,
    prediction: Prediction = "classes",
    temperature: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Return how far a student's predictions are from its teacher's.

    Classes: :func:`soft_cross_entropy`. Labels: the same of each label, as a choice between it and its absence, summed
    over labels. Numbers: the squared distance, averaged over them; no temperature.

    Args:
        student: Logits, ``[..., C]``.
        teacher: Logits of the same shape; a constant.
        prediction: What they stand for.
        temperature: ``tau``, positive.
        weight: How much each prediction counts, ``[...]``; all alike if None.

    Departs from the paper: the official code lets exits of a regression learn nothing (specification §2.1), and knows
    no texts with several labels.

    Example:
        >>> prediction_distance(torch.tensor([[1.0]]), torch.tensor([[3.0]]), "numbers")
        tensor(4.)
    """
    if prediction == "classes":
        return soft_cross_entropy(student, teacher, temperature, weight)
    if prediction == "numbers":
        return _mean((student.float() - teacher.detach().float()).pow(2).mean(dim=-1), weight)
    pairs = [torch.stack([logits, torch.zeros_like(logits)], dim=-1) for logits in (student, teacher)]
    count = student.shape[-1]
    each = None if weight is None else weight.unsqueeze(-1).expand(student.shape)
    return count * soft_cross_entropy(pairs[0], pairs[1], temperature, each)


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


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values.mean()
    weight = weight.detach().float()
    kept = values.masked_fill(weight == 0, 0.0)
    return (weight * kept).sum() / weight.sum().clamp_min(torch.finfo(torch.float32).tiny)


class DistillationLossMixin(LossMixin):
    """For modules with an objective of their own that want to place the terms themselves."""

    def distillation_loss(self) -> Tensor | float:
        """Return the weighted distance to the teacher for this step; 0 before distillation starts."""
        return sum(self.compression_terms("distillation").values(), start=0.0)
