"""The pressure on thresholds, against hand-worked numbers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_compress.losses.soft_threshold_rank import (
    expected_size,
    size_over_budget,
    terms,
    threshold_decay,
)
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig, prepare, update
from tests.toys import tiny_bert


def test_threshold_decay_sums_over_layers() -> None:
    alphas = [torch.tensor(0.0), torch.tensor(math.log(2.0))]
    assert float(threshold_decay(alphas)) == pytest.approx(1.5)


def test_expected_size_equals_a_slow_sum_and_is_capped_at_dense() -> None:
    sigma, alpha, scale = torch.tensor([3.0, 1.0, 0.5]), torch.tensor(0.9), torch.tensor(2.0)
    shape, s = (4, 3), 5.0
    rank = sum(1 / (1 + math.exp(-s * (x / 2.0 - 0.9))) for x in (3.0, 1.0, 0.5))
    got = expected_size([sigma], [alpha], [scale], [shape], s)
    assert float(got) == pytest.approx(min(rank * 7, 12.0), rel=1e-5)
    full = expected_size([sigma], [torch.tensor(-5.0)], [scale], [shape], s)
    assert float(full) == 12.0


def test_a_capped_layer_still_feels_the_pressure_and_singular_values_do_not() -> None:
    sigma = torch.tensor([3.0, 1.0, 0.2], requires_grad=True)
    alpha = torch.tensor(0.0, requires_grad=True)
    expected_size([sigma], [alpha], [torch.tensor(1.0)], [(4, 3)], 5.0).backward()
    assert alpha.grad is not None and float(alpha.grad) < 0
    assert sigma.grad is None


@pytest.mark.parametrize(("size", "value"), [(50.0, 0.0), (100.0, 0.0), (200.0, math.log(2.0))])
def test_size_over_budget_is_zero_within_it(size: float, value: float) -> None:
    assert float(size_over_budget(torch.tensor(size), 100.0)) == pytest.approx(value)


def test_there_is_no_term_outside_the_search() -> None:
    assert terms(SimpleNamespace(phase="warmup")) == {} and terms(SimpleNamespace(phase="recovery")) == {}


@pytest.mark.parametrize(
    ("regularizer", "name"), [("target", "size_over_budget"), ("exp", "threshold_decay")]
)
def test_each_regularizer_pushes_every_threshold_up_and_scales_with_its_weight(
    regularizer: str, name: str
) -> None:
    values = []
    for weight in (1.0, 3.0):
        config = SoftThresholdRankConfig(
            regularizer=regularizer, regularizer_weight=weight, rank_multiple=1, warmup=0.0
        )
        handle = prepare(tiny_bert(), config)
        update(handle, 0.0)
        update(handle, 0.2)
        term = terms(handle)
        assert set(term) == {name}
        term[name].backward()
        assert all(float(layer.alpha.grad) < 0 for layer in handle.layers.values())
        values.append(float(term[name].detach()))
    assert values[1] == pytest.approx(3 * values[0])
