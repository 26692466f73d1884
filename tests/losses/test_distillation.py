"""Distances to a teacher: against numbers worked by hand, and slow loops over texts, tokens and classes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.losses.distillation import (
    DistillationLossMixin,
    hidden_state_distance,
    prediction_distance,
    representation_loss,
    soft_cross_entropy,
    terms,
)
from lightning_compress.nn.distillation import Lesson

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


def slow_distance(student: Tensor, teacher: Tensor, real: Tensor) -> float:
    total = 0.0
    for own_TD, theirs_TD, real_T in zip(student, teacher, real, strict=True):
        apart = [
            sum((a - b) ** 2 for a, b in zip(own_TD[t].tolist(), theirs_TD[t].tolist(), strict=True))
            / len(own_TD[t])
            for t in range(len(real_T))
            if real_T[t]
        ]
        total += sum(apart) / len(apart)
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


def test_the_distance_of_states_is_the_one_worked_by_hand() -> None:
    student_BTD = torch.tensor([[[3.0, 1.0], [2.0, 0.0]], [[1.0, 1.0], [7.0, 7.0]]])
    weight_BT = torch.tensor([[1, 1], [1, 0]])
    expected = ((9 + 1) / 2 + 4 / 2) / 2 / 2 + ((1 + 1) / 2) / 1 / 2  # texts of two tokens and of one
    assert float(hidden_state_distance(student_BTD, torch.zeros(2, 2, 2), weight_BT)) == pytest.approx(
        expected
    )


def test_the_distance_of_states_is_what_a_loop_adds_up() -> None:
    student_BTD, teacher_BTD = random(2, 5, 7), random(2, 5, 7, seed=1)
    got = float(hidden_state_distance(student_BTD, teacher_BTD, REAL_BT))
    assert got == pytest.approx(slow_distance(student_BTD, teacher_BTD, REAL_BT), rel=1e-5)


@pytest.mark.parametrize("fill", [5.0, torch.inf, torch.nan])
def test_padding_changes_neither_value_nor_gradient(fill: float) -> None:
    student_BTD, teacher_BTD = random(2, 5, 7).requires_grad_(), random(2, 5, 7, seed=1)
    plain = hidden_state_distance(student_BTD, teacher_BTD, REAL_BT)
    (gradient_BTD,) = torch.autograd.grad(plain, student_BTD)
    pad_BTD = torch.full((2, 3, 7), fill)
    longer_BTD = torch.cat([pad_BTD, student_BTD, pad_BTD], dim=1)
    theirs_BTD = torch.cat([pad_BTD, teacher_BTD, pad_BTD], dim=1)
    real_BT = F.pad(REAL_BT, (3, 3))
    padded = hidden_state_distance(longer_BTD, theirs_BTD, real_BT)
    assert torch.allclose(padded, plain)
    assert torch.allclose(torch.autograd.grad(padded, student_BTD)[0], gradient_BTD)


def test_a_text_that_left_altogether_counts_as_nothing() -> None:
    weight_BT = torch.tensor([[0.0, 0.0], [1.0, 0.5]])
    states_BTD = torch.ones(2, 2, 3).requires_grad_()
    distance = hidden_state_distance(states_BTD, torch.zeros(2, 2, 3), weight_BT)
    distance.backward()
    assert float(distance.detach()) == pytest.approx(0.5)
    assert states_BTD.grad is not None and not states_BTD.grad[0].any() and states_BTD.grad.isfinite().all()


def test_a_teacher_gets_no_gradient() -> None:
    student, teacher = random(2, 5, 7).requires_grad_(), random(2, 5, 7, seed=1).requires_grad_()
    (hidden_state_distance(student, teacher, REAL_BT) + soft_cross_entropy(student, teacher)).backward()
    assert teacher.grad is None and student.grad is not None


def test_layers_add_up() -> None:
    triples = [(random(2, 5, 7, seed=s), random(2, 5, 7, seed=s + 9), REAL_BT) for s in range(3)]
    expected = sum(float(hidden_state_distance(*triple)) for triple in triples)
    assert float(representation_loss(triples)) == pytest.approx(expected)


def lesson_handle(lesson: Lesson | None, logit_weight: float = 2.0) -> Any:
    config = SimpleNamespace(hidden_weight=3.0, temperature=1.0)
    return SimpleNamespace(
        lesson=lambda: lesson, config=config, logit_weight=logit_weight, prediction="classes"
    )


def test_terms_are_weighted_sums_over_layers_and_exits() -> None:
    states = [(random(2, 5, 7), random(2, 5, 7, seed=1), REAL_BT)]
    logits = [(random(2, 3, seed=s), random(2, 3, seed=s + 5)) for s in range(2)]
    got = terms(lesson_handle(Lesson(states, logits, None)))
    assert float(got["hidden"]) == pytest.approx(3 * float(representation_loss(states)))
    assert float(got["logit"]) == pytest.approx(2 * sum(float(soft_cross_entropy(*pair)) for pair in logits))
    assert terms(lesson_handle(Lesson(states, [], None))).keys() == {"hidden"}
    assert terms(lesson_handle(Lesson([], logits, None))).keys() == {"logit"}
    assert terms(lesson_handle(None)) == {}


def test_predictions_that_rest_still_send_gradients_of_zero() -> None:
    head = nn.Linear(4, 3)
    pair = head(random(2, 4)), random(2, 3)
    got = terms(lesson_handle(Lesson([], [pair], None), logit_weight=0.0))["logit"]
    got.backward()
    assert float(got.detach()) == 0.0 and head.weight.grad is not None and not head.weight.grad.any()


def test_the_mixin_asks_for_the_terms_of_distillation() -> None:
    class Module(DistillationLossMixin):
        def __init__(self) -> None:
            source = SimpleNamespace(take_loss_terms=lambda stem: {f"{stem}/hidden": torch.tensor(1.5)})
            self._compression = SimpleNamespace(compressor=source)

    assert Module().distillation_loss() == 1.5
    with pytest.raises(RuntimeError, match="no compression callback"):
        DistillationLossMixin().distillation_loss()
