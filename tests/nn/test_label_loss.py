"""The losses against labels, by hand and by a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_compress.nn.label_loss import label_loss, next_token_loss
from tests.slow_losses import one_hot, slow_cross_entropy


def test_the_label_loss_by_hand_and_by_a_loop() -> None:
    assert label_loss(torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([1])).item() == pytest.approx(
        math.log(4 / 3), abs=1e-6
    )
    logits_BC = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = [0, 2, 1, 1, 0, 2]
    expected = slow_cross_entropy(logits_BC, one_hot(labels, 3))
    assert label_loss(logits_BC, torch.tensor(labels)).item() == pytest.approx(expected, abs=1e-6)


def test_texts_without_a_label_do_not_count() -> None:
    logits_BC = torch.tensor([[1.0, 0.0], [5.0, -5.0]])
    assert torch.equal(
        label_loss(logits_BC, torch.tensor([0, -100])), label_loss(logits_BC[:1], torch.tensor([0]))
    )


def test_numbers_have_a_squared_error() -> None:
    for labels in (torch.tensor([1.0, 5.0]), torch.tensor([[1.0], [5.0]]), torch.tensor([1, 5])):
        assert label_loss(torch.tensor([[2.0], [3.0]]), labels).item() == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("labels", [torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0]]), torch.tensor([0.5])])
def test_labels_that_are_no_class_are_refused(labels: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"no class indices.* set config\.problem_type = \"multi_label_classification\""
    ):
        label_loss(torch.zeros(1, 2), labels)


def test_the_next_token_loss_by_a_loop() -> None:
    logits_BTV = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    labels_BT = torch.tensor([[1, 2, -100, 0], [3, -100, -100, 4]])
    losses = []
    for b in range(2):
        for t in range(3):
            if labels_BT[b, t + 1] != -100:
                target = one_hot([int(labels_BT[b, t + 1])], 5)
                losses.append(slow_cross_entropy(logits_BTV[b, t : t + 1], target))
    assert next_token_loss(logits_BTV, labels_BT).item() == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_logits_of_half_precision_are_priced_in_fp32() -> None:
    logits_BTV = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)).bfloat16()
    labels_BT = torch.tensor([[1, 2, 0], [3, 3, 1]])
    for loss, logits, labels in (
        (next_token_loss, logits_BTV, labels_BT),
        (label_loss, logits_BTV[:, 0], labels_BT[:, 0]),
        (label_loss, logits_BTV[:, 0, :1], torch.tensor([0.1, 0.7])),
    ):
        found = loss(logits, labels)
        assert found.dtype == torch.float32 and torch.equal(found, loss(logits.float(), labels))
