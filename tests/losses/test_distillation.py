"""Distances to a teacher: against numbers worked by hand, and slow loops over texts, tokens and classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.losses.distillation import (
    DistillationLossMixin,
    hidden_state_distance,
    representation_loss,
    terms,
)
from lightning_compress.nn.distillation import Lesson
from lightning_compress.nn.soft_label_loss import soft_cross_entropy

REAL_BT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
