"""What an answer costs against a teacher's: soft cross-entropy of classes, and what stands for it elsewhere.

Computed in fp32, whatever the logits come in. Students and exits learn by it
(:mod:`lightning_compress.losses.distillation`, :mod:`lightning_compress.losses.multi_exit`), and widths may be judged
by it (:mod:`lightning_compress.nn.importance_loss`). Against labels: :mod:`lightning_compress.nn.label_loss`.

Shape legend: C classes.

Paper: COST-EFF (arXiv 2210.15523), equations after its official code, specification §2.1.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Prediction", "prediction_distance", "soft_cross_entropy"]

Prediction: TypeAlias = Literal["classes", "labels", "numbers"]
"""What logits stand for: one of several classes, several labels each true or not, or plain numbers."""


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


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values.mean()
    weight = weight.detach().float()
    kept = values.masked_fill(weight == 0, 0.0)
    return (weight * kept).sum() / weight.sum().clamp_min(torch.finfo(torch.float32).tiny)
