"""Losses against a teacher's answers: numbers worked by hand, and slow loops over texts and classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.nn.soft_label_loss import prediction_distance, soft_cross_entropy

REAL_BT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_cross_entropy(student: Tensor, teacher: Tensor, tau: float) -> float:
    """One number after the other."""
    total = 0.0
    for own, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        norms = [math.log(sum(math.exp(z / tau) for z in row)) for row in (own, theirs)]
        for own_c, their_c in zip(own, theirs, strict=True):
            total -= math.exp(their_c / tau - norms[1]) * (own_c / tau - norms[0])
    return total / len(student)


def test_the_soft_cross_entropy_is_the_one_worked_by_hand() -> None:
    # student (0, ln 3): p = 1/4, 3/4; teacher (ln 2, 0): q = 2/3, 1/3
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(2), 0.0]])
    expected = 2 / 3 * math.log(4) + 1 / 3 * math.log(4 / 3)
    assert float(soft_cross_entropy(student, teacher)) == pytest.approx(expected)


@pytest.mark.parametrize("tau", [1.0, 2.0, 0.5])
def test_the_soft_cross_entropy_is_what_a_loop_adds_up(tau: float) -> None:
    student, teacher = 3 * random(6, 4), 3 * random(6, 4, seed=1)
    expected = tau**2 * slow_cross_entropy(student, teacher, tau)
    assert float(soft_cross_entropy(student, teacher, tau)) == pytest.approx(expected, rel=1e-5)


def test_its_gradient_is_the_difference_of_probabilities() -> None:
    student, teacher = random(3, 4).requires_grad_(), random(3, 4, seed=1)
    soft_cross_entropy(student, teacher, temperature=2.0).backward()
    expected = 2.0 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 3  # tau^2 / tau / B
    assert torch.allclose(student.grad, expected, atol=1e-6)


def test_a_sure_teacher_is_a_label() -> None:
    student, labels = random(5, 3), torch.tensor([0, 2, 1, 1, 0])
    sure = 1e4 * F.one_hot(labels, 3).float()
    assert torch.allclose(soft_cross_entropy(student, sure), F.cross_entropy(student, labels))


def test_it_holds_for_logits_that_would_overflow_and_in_half_precision() -> None:
    huge = torch.tensor([[1e5, -1e5]])
    assert float(soft_cross_entropy(huge, huge)) == 0.0
    half = soft_cross_entropy(random(4, 3).bfloat16(), random(4, 3, seed=1).bfloat16())
    assert half.dtype == torch.float32
    assert torch.allclose(half, soft_cross_entropy(random(4, 3), random(4, 3, seed=1)), atol=0.02)


def test_predictions_per_token_count_by_their_weight() -> None:
    student, teacher = random(2, 5, 4), random(2, 5, 4, seed=1)
    rows = [(b, t) for b in range(2) for t in range(5) if REAL_BT[b, t]]
    expected = slow_cross_entropy(
        torch.stack([student[row] for row in rows]), torch.stack([teacher[row] for row in rows]), 1.0
    )
    student[~REAL_BT], teacher[~REAL_BT] = torch.nan, torch.nan
    assert float(soft_cross_entropy(student, teacher, weight=REAL_BT)) == pytest.approx(expected, rel=1e-5)


def test_numbers_are_compared_by_their_squared_distance() -> None:
    student, teacher = torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [4.0]])
    assert float(prediction_distance(student, teacher, "numbers", temperature=5.0)) == 2.0


def test_labels_are_compared_one_by_one() -> None:
    student, teacher = 2 * random(3, 4), 2 * random(3, 4, seed=1)
    expected = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="sum") / 3
    assert torch.allclose(prediction_distance(student, teacher, "labels"), expected)
    first = torch.tensor([1, 0, 0])
    alone = prediction_distance(student[:1], teacher[:1], "labels")
    assert torch.allclose(prediction_distance(student, teacher, "labels", weight=first), alone)
