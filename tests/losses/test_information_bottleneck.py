"""The two terms of the bottleneck: against numbers worked by hand, the official code's form, and the derivation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.losses.information_bottleneck import (
    ENTROPY_WEIGHT,
    NORM_WEIGHTS,
    InformationBottleneckLossMixin,
    information_bound,
    kept_ratio,
    masked_norm,
    negative_entropy,
    norm_weight_per_text,
)

REAL_BT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
FORMS: list[Any] = ["rms", "kl", "batch_fro"]


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 7, generator=generator), torch.rand(2, 5, generator=generator)


def padded(values: Tensor, fill: float) -> Tensor:
    """Add four places of padding at the right, and one at the left."""
    shape = list(values.shape)
    right, left = ([*shape[:1], number, *shape[2:]] for number in (4, 1))
    return torch.cat([values.new_full(left, fill), values, values.new_full(right, fill)], dim=1)


def test_norms_are_those_worked_by_hand() -> None:
    hidden_BTD = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.0]]])
    keep_BT = torch.tensor([[1.0, 0.5], [0.5, 0.7]])
    real_BT = torch.tensor([[True, True], [True, False]])
    rms = (math.sqrt((25 + 0.25 * 4) / 2) + 0.5) / 2
    kl = 0.5 * ((25 + 0.5 * 4) / 2 + 0.5) / 2
    fro = math.sqrt(25 + 0.25 * 4 + 0.25)
    for form, expected in zip(FORMS, (rms, kl, fro), strict=True):
        assert float(masked_norm(hidden_BTD, keep_BT, real_BT, form)) == pytest.approx(expected)


def test_the_frobenius_form_is_the_official_one_where_nothing_is_padded() -> None:
    hidden_BTD, keep_BT = example()
    official = torch.linalg.norm(hidden_BTD * keep_BT[..., None])
    assert torch.allclose(masked_norm(hidden_BTD, keep_BT, torch.ones_like(REAL_BT), "batch_fro"), official)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form='l1' is not"):
        masked_norm(*example(), REAL_BT, "l1")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_no_penalty_whatever_it_holds(form: Any) -> None:
    hidden_BTD, keep_BT = example()
    wide = padded(hidden_BTD, 9.0), padded(keep_BT, 0.5), padded(REAL_BT, False)
    assert torch.allclose(masked_norm(*wide, form), masked_norm(hidden_BTD, keep_BT, REAL_BT, form))
    assert torch.allclose(negative_entropy(*wide[1:]), negative_entropy(keep_BT, REAL_BT))
    assert torch.allclose(kept_ratio(*wide[1:]), kept_ratio(keep_BT, REAL_BT))
    filled = keep_BT.masked_fill(~REAL_BT, 0.9)
    assert torch.equal(kept_ratio(filled, REAL_BT), kept_ratio(keep_BT, REAL_BT))


@pytest.mark.parametrize("form", ["rms", "kl"])
def test_the_default_forms_do_not_depend_on_the_batch(form: Any) -> None:
    hidden_BTD, keep_BT = example()
    alone = [
        masked_norm(hidden_BTD[row : row + 1], keep_BT[row : row + 1], REAL_BT[row : row + 1], form)
        for row in (0, 1)
    ]
    together = masked_norm(hidden_BTD, keep_BT, REAL_BT, form)
    assert torch.allclose(together, torch.stack(alone).mean())
    twice = masked_norm(hidden_BTD.repeat(2, 1, 1), keep_BT.repeat(2, 1), REAL_BT.repeat(2, 1), form)
    assert torch.allclose(twice, together)


def test_entropies_are_taken_element_by_element() -> None:
    keep_BT = torch.tensor([[0.5, 0.9, 1.0], [0.1, 0.2, 0.3]])
    real_BT = torch.tensor([[True, True, True], [True, False, False]])

    def h(s: float) -> float:
        return s * math.log(s) + (1 - s) * math.log(1 - s)

    expected = ((h(0.5) + h(0.9) + h(1 - 1e-6)) / 3 + h(0.1)) / 2
    assert float(negative_entropy(keep_BT, real_BT)) == pytest.approx(expected, rel=1e-5)
    clipped_BT = keep_BT.clamp(
        1e-6, 1 - 1e-6
    )  # the official code: example 0's second logarithm for the batch
    official = clipped_BT * clipped_BT.log() + (1 - clipped_BT) * (1 - clipped_BT[:1]).log()
    assert not torch.allclose(negative_entropy(keep_BT, torch.ones_like(real_BT)), official.mean(), atol=0.01)


def test_certain_decisions_have_no_entropy_and_finite_gradients() -> None:
    keep_BT = torch.tensor([[0.0, 1.0]], requires_grad=True)
    value = negative_entropy(keep_BT, torch.ones(1, 2).bool())
    value.backward()
    assert -2e-5 < float(value.detach()) <= 0 and bool(keep_BT.grad.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_states_of_which_nothing_is_let_through_have_finite_gradients(form: Any) -> None:
    hidden_BTD, keep_BT = example()[0].requires_grad_(), torch.zeros(2, 5, requires_grad=True)
    norm = masked_norm(hidden_BTD, keep_BT, REAL_BT, form)
    norm.backward()
    assert float(norm.detach()) == 0.0
    assert bool(hidden_BTD.grad.isfinite().all()) and bool(keep_BT.grad.isfinite().all())


@pytest.mark.parametrize("variance", [1.0, 4.0])
def test_the_bound_is_the_expected_log_ratio_over_all_decisions(variance: float) -> None:
    hidden_BTD, keep_BT = (part[:1, :4].double() for part in example())
    expected = 0.0
    for mask in itertools.product((0.0, 1.0), repeat=4):
        mask_T = torch.tensor(mask, dtype=torch.double)
        probability_T = torch.where(mask_T == 1, keep_BT[0], 1 - keep_BT[0])
        log_prior = -(mask_T[:, None] * hidden_BTD[0]).square().sum() / (2 * variance)
        expected += float(probability_T.prod() * (probability_T.log().sum() - log_prior)) / 4
    bound = information_bound(hidden_BTD, keep_BT, torch.ones(1, 4).bool(), variance=variance)
    assert float(bound) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="variance=0"):
        information_bound(hidden_BTD, keep_BT, torch.ones(1, 4).bool(), variance=0)


def test_published_weights_start_every_form_with_the_same_penalty() -> None:
    states = torch.randn(32, 68, 64)
    states = 15.0 * states / states.norm(dim=2, keepdim=True)
    everything = torch.ones(32, 68)
    penalties = [
        weight * float(masked_norm(states, everything, everything.bool(), form))
        for form, weight in NORM_WEIGHTS.items()
    ]
    assert penalties == pytest.approx([4e-4 * 15 * math.sqrt(2176)] * 3, rel=1e-4)
    assert NORM_WEIGHTS["rms"] == norm_weight_per_text(4e-4, 32 * 68) == pytest.approx(0.01866, abs=1e-5)
    assert ENTROPY_WEIGHT == 4e-4


def test_the_norm_lowers_probabilities_and_the_entropy_draws_them_to_one_half() -> None:
    hidden_BTD, real_BT = example()[0], torch.ones_like(REAL_BT)
    for start, norm, entropy in ((0.9, 1, 1), (0.1, 1, -1)):
        keep_BT = torch.full((2, 5), start, requires_grad=True)
        slope_BT = torch.autograd.grad(masked_norm(hidden_BTD, keep_BT, real_BT), keep_BT)[0]
        assert bool((slope_BT.sign() == norm).all())
        slope_BT = torch.autograd.grad(negative_entropy(keep_BT, real_BT), keep_BT)[0]
        assert bool((slope_BT.sign() == entropy).all())


def test_the_mixin_prices_any_states_under_any_mask() -> None:
    class Gated(InformationBottleneckLossMixin, torch.nn.Module): ...

    hidden_BTD, keep_BT = (part.requires_grad_() for part in example())
    price = Gated().information_bottleneck_loss
    loss = price(hidden_BTD, keep_BT, REAL_BT, form="kl", norm_weight=0.3, entropy_weight=0.2)
    expected = 0.3 * masked_norm(hidden_BTD, keep_BT, REAL_BT, "kl") + 0.2 * negative_entropy(
        keep_BT, REAL_BT
    )
    assert torch.equal(loss, expected)
    loss.backward()
    assert (
        float(hidden_BTD.grad[REAL_BT].abs().min()) > 0 and float(hidden_BTD.grad[~REAL_BT].abs().max()) == 0
    )
    everything = price(hidden_BTD, keep_BT)
    assert torch.equal(
        everything, price(hidden_BTD, keep_BT, torch.ones_like(REAL_BT), norm_weight=NORM_WEIGHTS["rms"])
    )
