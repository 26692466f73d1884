"""The loss that the official code of COST-EFF reads importance off, made of what a teacher says and of labels.

It is not the loss that the same code trains on: labels count too, and hidden states are averaged in another way. Which
batches, and what becomes of the gradients, stands in :mod:`lightning_compress.methods.width_calibration`.

Shape legend: B batch, T padded length, D hidden size.

Paper: COST-EFF (arXiv 2210.15523), after its official code, specification §3.2 and §6-B, A8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_compress.nn.distillation import Lesson
from lightning_compress.nn.soft_label_loss import Prediction, prediction_distance

__all__ = ["official_losses", "state_distance"]

_SOFT, _HARD = 0.9, 0.1
"""Weights of what a teacher says and of labels, fixed in the official code."""


def official_losses(
    lesson: Lesson, hard: Sequence[Tensor], prediction: Prediction = "classes"
) -> list[Tensor]:
    """Return ``0.9 SCE(z_l^S, z_l^T) + 0.1 CE(z_l^S, y)`` of each exit, and the distance of all states last.

    Args:
        lesson: What student and teacher say of the same texts; as many pairs of logits as there are losses in ``hard``.
        hard: Losses against labels, of each exit.
        prediction: What logits stand for.

    Paper: specification §3.2, summands of ``L_imp``.
    Departs from the paper: numbers and texts with several labels are compared too, see
    :func:`~lightning_compress.nn.soft_label_loss.prediction_distance`.

    Example:
        >>> logits, state = torch.zeros(1, 2), torch.zeros(1, 1, 4)
        >>> lesson = Lesson([(state, state + 2.0, torch.ones(1, 1))], [(logits, logits)], None)
        >>> official_losses(lesson, [torch.tensor(1.0)])  # 0.9 ln 2 + 0.1, and 2 * 2
        [tensor(0.7238), tensor(4.)]
    """
    soft = [
        prediction_distance(own, theirs, prediction, weight=lesson.weight) for own, theirs in lesson.logits
    ]
    costs = [_SOFT * a + _HARD * b for a, b in zip(soft, hard, strict=True)]
    return [*costs, state_distance(lesson.states)]


def state_distance(states: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return ``sum_l mean_btj (m_bt (h^S_btj - h^T_btj))^2``, the mean over all entries, zeros of padding among them.

    Args:
        states: For each layer the student's ``[B, T, D]``, the teacher's, and how much each token counts, ``[B, T]``.

    Paper: specification §3.2; unlike ``L_rep`` of §2.1, padding makes it smaller.

    Example:
        >>> own_BTD = torch.tensor([[[2.0], [9.0]]])
        >>> state_distance([(own_BTD, torch.zeros(1, 2, 1), torch.tensor([[1, 0]]))])
        tensor(2.)
    """
    costs = []
    for student_BTD, teacher_BTD, weight_BT in states:
        weight_BT1 = weight_BT.detach().float().unsqueeze(-1)
        apart_BTD = student_BTD.float() - teacher_BTD.detach().float()
        apart_BTD = apart_BTD.masked_fill(weight_BT1 == 0, 0.0)  # whatever padding holds
        costs.append((weight_BT1 * apart_BTD).pow(2).mean())
    return torch.stack(costs).sum()
