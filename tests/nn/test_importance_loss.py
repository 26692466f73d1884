"""The official loss that importance is read off: against numbers worked by hand, and slow loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.nn.distillation import Lesson
from lightning_compress.nn.importance_loss import official_losses, state_distance
from tests.slow_losses import slow_cross_entropy, slow_softmax


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


REAL_BT = torch.tensor([[1, 1, 0], [1, 1, 1]])


def states(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(random(2, 3, 4, seed=s), random(2, 3, 4, seed=s + 50), REAL_BT) for s in range(count)]


def slow_mean_of_squares(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for text in range(2):
        for token in range(3):
            for unit in range(4):
                apart = float(student[text, token, unit] - teacher[text, token, unit])
                total += apart**2 if REAL_BT[text, token] else 0.0
    return total / (2 * 3 * 4)  # padding is counted, as zero


def test_the_mean_over_states_is_the_one_worked_by_hand() -> None:
    student_BTD = torch.tensor([[[3.0, 1.0], [2.0, 0.0]], [[1.0, 1.0], [7.0, 7.0]]])
    weight_BT = torch.tensor([[1, 1], [1, 0]])
    expected = (9 + 1 + 4 + 0 + 1 + 1) / 8  # eight entries, two of them padding
    assert float(state_distance([(student_BTD, torch.zeros(2, 2, 2), weight_BT)])) == expected


def test_layers_add_up_to_what_a_loop_finds() -> None:
    expected = sum(slow_mean_of_squares(own, theirs) for own, theirs, _ in states(3))
    assert float(state_distance(states(3))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fill", [5.0, torch.inf, torch.nan])
def test_what_padding_holds_changes_neither_value_nor_gradient(fill: float) -> None:
    (student_BTD, teacher_BTD, weight_BT), filled = states(1)[0], states(1)[0][0]
    filled[0, 2] = fill
    gradients = []
    for own in (student_BTD.requires_grad_(), filled.requires_grad_()):
        value = state_distance([(own, teacher_BTD, weight_BT)])
        gradients.append((float(value.detach()), torch.autograd.grad(value, own)[0]))
    assert gradients[0][0] == gradients[1][0] and torch.equal(gradients[0][1], gradients[1][1])


def test_each_exit_mixes_nine_tenths_of_the_teacher_and_a_tenth_of_the_labels() -> None:
    logits = [(2 * random(5, 3, seed=s), 2 * random(5, 3, seed=s + 9)) for s in range(2)]
    labels = torch.tensor([0, 2, 1, 1, 0])
    hard = [F.cross_entropy(own, labels) for own, _ in logits]
    got = official_losses(Lesson(states(2), logits, None), hard)
    assert len(got) == 3
    for cost, (own, theirs), label_cost in zip(got[:2], logits, hard, strict=True):
        soft = slow_cross_entropy(own, [slow_softmax(row) for row in theirs.tolist()])
        assert float(cost) == pytest.approx(0.9 * soft + 0.1 * float(label_cost), rel=1e-5)
    assert torch.equal(got[2], state_distance(states(2)))


def test_predictions_per_token_leave_padding_out() -> None:
    own_BTC, theirs_BTC = random(2, 3, 5), random(2, 3, 5, seed=1)
    real_BT = REAL_BT.bool()
    got = official_losses(Lesson(states(1), [(own_BTC, theirs_BTC)], real_BT), [torch.tensor(0.0)])
    targets = [slow_softmax(row) for row in theirs_BTC[real_BT].tolist()]
    assert float(got[0]) == pytest.approx(0.9 * slow_cross_entropy(own_BTC[real_BT], targets), rel=1e-5)


def test_the_teacher_gets_no_gradient() -> None:
    own, theirs = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    state, other = random(2, 3, 4).requires_grad_(), random(2, 3, 4, seed=1).requires_grad_()
    lesson = Lesson([(state, other, REAL_BT)], [(own, theirs)], None)
    torch.stack(official_losses(lesson, [torch.tensor(1.0)])).sum().backward()
    assert theirs.grad is None and other.grad is None
    assert own.grad is not None and state.grad is not None
