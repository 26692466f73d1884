"""The layers of SoftThresholdRank, against hand-worked numbers and a slow reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.soft_threshold_rank import (
    LowRankLinear,
    SoftThresholdLinear,
    shrink_singular_values,
)


def layer(inputs: int = 7, outputs: int = 5, **settings: bool) -> tuple[nn.Linear, SoftThresholdLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    return linear, SoftThresholdLinear(linear, **settings)


def slow_gate(x: float, alpha: float, s: float) -> float:
    return x * math.tanh(s * (x - alpha)) if x > alpha else 0.0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75])
def test_the_gate_equals_the_formula_worked_by_hand(alpha: float) -> None:
    values = [0.0, 0.1, 0.3, 0.31, 0.75, 0.8, 2.0]
    got = shrink_singular_values(
        torch.tensor(values, dtype=torch.float64), torch.tensor(alpha, dtype=torch.float64), 50.0
    )
    assert got.tolist() == pytest.approx([slow_gate(x, alpha, 50.0) for x in values], abs=1e-12)


def test_the_gate_has_the_derivatives_of_the_specification() -> None:
    sigma = torch.tensor([0.2, 0.52, 0.6], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    shrink_singular_values(sigma, alpha, 50.0).sum().backward()
    u = [50 * (x - 0.5) for x in (0.52, 0.6)]
    by_x = [math.tanh(v) + 50 * x * (1 - math.tanh(v) ** 2) for v, x in zip(u, (0.52, 0.6), strict=True)]
    by_alpha = -sum(50 * x * (1 - math.tanh(v) ** 2) for v, x in zip(u, (0.52, 0.6), strict=True))
    assert sigma.grad is not None and alpha.grad is not None
    assert sigma.grad.tolist() == pytest.approx([0.0, *by_x])
    assert float(alpha.grad) == pytest.approx(by_alpha)


def test_thresholds_may_be_relative_to_a_scale() -> None:
    sigma, alpha = torch.tensor([10.0, 3.0]), torch.tensor(0.5)
    got = shrink_singular_values(sigma, alpha, 50.0, scale=10.0)
    assert got.tolist() == [10.0, 0.0]


@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_an_open_layer_is_the_dense_layer(tokens: int) -> None:
    linear, made = layer()
    x = torch.randn(2, tokens, 7)
    assert torch.allclose(made(x), linear(x), atol=1e-6)
    assert made.rank == made.full_rank == 5


def test_a_conv1d_is_transposed_before_it_is_decomposed() -> None:
    torch.manual_seed(0)
    conv, x = Conv1D(5, 7), torch.randn(3, 7)
    assert torch.allclose(SoftThresholdLinear(conv)(x), conv(x), atol=1e-6)


def test_both_ways_to_multiply_agree_in_value_and_gradient() -> None:
    _, made = layer()
    made.enter("gated")
    with torch.no_grad():
        made.alpha.fill_(0.4)
    x_few, grads = torch.randn(2, 7), []
    for x in (x_few, x_few.repeat(300, 1)):
        made.zero_grad()
        y = made(x)
        (y**2).sum().backward()
        grads.append(
            (y[:2].detach(), made.sigma_M.grad.clone(), made.alpha.grad.clone(), made.u_OM.grad.clone())
        )
    for few, many in zip(grads[0], grads[1], strict=True):
        if few.shape == (2, 5):
            assert torch.allclose(few, many, atol=1e-5)
        else:
            assert torch.allclose(300 * few, many, rtol=1e-3, atol=1e-3)


def test_a_pinned_layer_uses_full_magnitude_and_leaves_dead_directions_alone() -> None:
    linear, made = layer()
    mask = torch.tensor([True, False, True, False, False])
    made.pin(mask)
    u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    expected = F.linear(torch.eye(7), (u * (s * mask)) @ vh, linear.bias)
    y = made(torch.eye(7))
    assert torch.allclose(y, expected, atol=1e-5) and made.rank == 2
    y.sum().backward()
    assert bool((made.u_OM.grad[:, ~mask] == 0).all()) and bool((made.u_OM.grad[:, mask] != 0).any())


@pytest.mark.parametrize("mode", ["open", "gated", "pinned"])
def test_every_parameter_is_in_the_graph_in_every_mode(mode: str) -> None:
    _, made = layer()
    made.enter(mode)  # type: ignore[arg-type]
    made(torch.randn(3, 7)).sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert mode == "gated" or float(made.alpha.grad) == 0.0


def test_whitening_loses_least_output_energy_where_inputs_are_uneven() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(12, 9, bias=False)
    x = torch.randn(400, 12) * torch.logspace(-1, 1, 12)
    errors = {}
    for whitened in (False, True):
        made = SoftThresholdLinear(linear)
        made.enter("open", calibrate=whitened)
        made.train()(x)
        made.factorise()
        assert made.moment_II is None
        assert torch.allclose(made.weight, linear.weight, atol=1e-4)
        made.pin(torch.arange(9) < 4)
        errors[whitened] = float((made(x) - linear(x)).detach().square().sum())
    root = torch.linalg.cholesky((x.T @ x).double())
    best = float(torch.linalg.svdvals(linear.weight.detach().double() @ root)[4:].square().sum())
    assert errors[True] == pytest.approx(best, rel=0.02)
    assert errors[True] < 0.8 * errors[False]


def test_calibration_gathers_only_while_training() -> None:
    _, made = layer()
    made.enter("open", calibrate=True)
    made.eval()(torch.randn(4, 7))
    assert made.moment_II is None
    x = torch.randn(4, 7)
    made.train()(x)
    assert torch.allclose(made.moment_II, x.T @ x, atol=1e-5)


@pytest.mark.parametrize("sequences", [8, 32, 128, 512])
def test_calibration_sees_all_positions_whatever_the_batch(sequences: int) -> None:
    _, made = layer(64, 5)
    made.enter("open", calibrate=True)
    positions = torch.eye(64).repeat(sequences, 1)
    made.train()(positions)
    seen = made.moment_II.diagonal()
    assert float(seen.sum()) == 256 and int((seen > 0).sum()) >= 60


def test_rank_deficient_inputs_can_be_whitened() -> None:
    linear, made = layer()
    made.enter("open", calibrate=True)
    made.train()(torch.randn(1, 7).repeat(3, 1))
    made.factorise()
    assert torch.allclose(made.weight, linear.weight, atol=1e-3)


def test_casting_keeps_singular_values_and_threshold_exact() -> None:
    _, made = layer()
    exact = made.sigma_M.detach().clone()
    made.to(torch.bfloat16)
    assert made.u_OM.dtype == torch.bfloat16 and made.alpha.dtype == torch.float32
    assert torch.equal(made.sigma_M, exact)
    assert made(torch.randn(3, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_frozen_weight_gives_frozen_factors_and_a_learnable_threshold() -> None:
    linear = nn.Linear(4, 4)
    linear.weight.requires_grad_(False)
    made = SoftThresholdLinear(linear)
    trainable = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trainable == {"alpha", "bias"}


def test_accounting_follows_the_rank_and_never_exceeds_dense() -> None:
    _, made = layer(7, 5)
    assert made.kept_parameters == 35
    made.pin(torch.arange(5) < 2)
    assert (made.kept_parameters, made.flops_per_token) == (24, 48)
    low = LowRankLinear(nn.Linear(7, 2, bias=False), nn.Linear(2, 5))
    assert (low.kept_parameters, low.flops_per_token, low.rank) == (24, 48, 2)


def test_a_low_rank_linear_shows_its_dense_product() -> None:
    low = LowRankLinear(nn.Linear(7, 2, bias=False), nn.Linear(2, 5))
    x = torch.randn(3, 7)
    assert torch.allclose(F.linear(x, low.weight, low.bias), low(x), atol=1e-6)


def test_gathered_inputs_move_with_the_layer() -> None:
    made = SoftThresholdLinear(nn.Linear(4, 3))
    made.enter("open", calibrate=True)
    made(torch.randn(5, 4))
    made.to("meta")
    assert made.settled_moment_II is not None and made.settled_moment_II.is_meta


def test_a_layer_whose_matrices_are_on_the_meta_device_is_narrowed_for_counting() -> None:
    _, made = layer()
    bias = made.bias
    made.to("meta")
    made.bias = bias
    made.keep_features([0, 3, 4], [1, 2])
    assert (made.in_features, made.out_features) == (3, 2) and made.u_OM.is_meta
    assert made.bias is not None and bias is not None and made.bias.tolist() == bias[[1, 2]].tolist()


def test_kept_directions_follow_a_loaded_mask() -> None:
    made, other = SoftThresholdLinear(nn.Linear(4, 4)), SoftThresholdLinear(nn.Linear(4, 4))
    made.pin(torch.tensor([True, False, True, False]))
    other.enter("pinned")
    other.load_state_dict(made.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(other(x), made(x))
    assert other.rank == 2


def test_weights_that_are_not_finite_are_named_as_such() -> None:
    linear = nn.Linear(4, 4)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        SoftThresholdLinear(linear)
