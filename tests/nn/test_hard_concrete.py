"""Hard concrete gates, against numbers worked by hand and frequencies."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_compress.nn.hard_concrete import expected_gate, open_probability, sample_gate


def slow_gate(location: float, noise: float) -> float:
    logit = math.log(noise) - math.log(1.0 - noise)
    soft = 1.0 / (1.0 + math.exp(-(logit + location) / (2.0 / 3.0)))
    return min(max(soft * 1.2 - 0.1, 0.0), 1.0)


@pytest.mark.parametrize("location", [-4.0, -0.5, 0.0, 1.5])
@pytest.mark.parametrize("noise", [0.05, 0.5, 0.8])
def test_a_gate_is_the_stretched_concrete_variable_cut_to_its_range(location: float, noise: float) -> None:
    gate = sample_gate(torch.tensor([location]), torch.tensor([noise]))
    assert gate.item() == pytest.approx(slow_gate(location, noise), abs=1e-5)


@pytest.mark.parametrize("location", [-2.0, 0.0, 1.0])
def test_gates_are_open_as_often_as_is_said(location: float) -> None:
    gates = sample_gate(torch.full((20_000,), location))
    probability = 1.0 / (1.0 + math.exp(-(location + (2.0 / 3.0) * math.log(11.0))))
    assert open_probability(torch.tensor(location)).item() == pytest.approx(probability, abs=1e-6)
    assert (gates > 0).float().mean().item() == pytest.approx(probability, abs=0.015)


def test_gates_within_their_range_have_a_gradient() -> None:
    location = torch.tensor([-9.0, 0.0, 9.0], requires_grad=True)
    sample_gate(location, torch.full((3,), 0.5)).sum().backward()
    assert location.grad is not None
    assert (location.grad > 0).tolist() == [False, True, False]


def test_noise_at_the_ends_of_its_range_stays_finite() -> None:
    gates = sample_gate(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert gates.tolist() == [0.0, 1.0]


def test_the_expected_gate_is_monotone_and_reaches_both_ends() -> None:
    gates = expected_gate(torch.linspace(-6.0, 6.0, 25))
    assert (gates.diff() >= 0).all() and gates[0] == 0.0 and gates[-1] == 1.0
