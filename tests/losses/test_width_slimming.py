"""The Lagrangian of learned gates, against numbers worked by hand and gradients taken numerically."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_compress.losses.width_slimming import (
    WidthSlimmingLossMixin,
    expected_cost,
    lagrangian,
    terms,
)
from lightning_compress.nn.width_costs import LayerCost
from tests.toys_slimming import slimmed


def test_the_expected_cost_sums_open_probabilities_times_costs() -> None:
    heads, neurons = torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 1.0, 3.0])

    def is_open(location: float) -> float:
        return 1.0 / (1.0 + math.exp(-(location + (2.0 / 3.0) * math.log(11.0))))

    by_hand = 10.0 * sum(map(is_open, heads.tolist())) + 2.0 * sum(map(is_open, neurons.tolist()))
    layers = [LayerCost(2, 3, 10.0, 2.0)]
    assert float(expected_cost(layers, [heads], [neurons])) == pytest.approx(by_hand, rel=1e-6)
    assert float(expected_cost(layers, [None], [None])) == 26.0


def test_the_multipliers_ascend_while_the_gates_descend() -> None:
    multipliers = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    gap = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = lagrangian(gap, multipliers, stiffness=5.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 0.2 + (1.0 + 5.0) * 0.04)
    assert multipliers.grad is not None and multipliers.grad.tolist() == pytest.approx([-0.2, -0.04])
    assert gap.grad is not None and gap.grad.item() == pytest.approx(0.5 + 2.0 * 6.0 * 0.2)


def test_taylor_criteria_and_quiet_phases_have_no_term() -> None:
    assert terms(slimmed(10, until=5)) == {}
    assert terms(slimmed(10, until=1, criterion="l0")) == {}
    assert terms(slimmed(10, criterion="l0")) == {}


def test_the_term_of_a_search_weighs_size_against_its_target() -> None:
    handle = slimmed(10, until=4, criterion="l0", target_params=0.5)
    assert handle.gates.multipliers is not None
    with torch.no_grad():
        handle.gates.multipliers.copy_(torch.tensor([2.0, 3.0]))
    gap = handle.metrics()["cost_ratio"] - handle.scheduled_ratio
    assert set(terms(handle)) == {"size"}
    assert terms(handle)["size"].item() == pytest.approx(2.0 * gap + 53.0 * gap**2, rel=1e-3)


def test_the_mixin_sums_the_terms_of_its_method() -> None:
    class Source:
        def take_loss_terms(self, stem: str | None = None) -> dict[str, torch.Tensor]:
            return {"width_slimming/size": torch.tensor(2.0)} if stem == "width_slimming" else {}

    class Module(WidthSlimmingLossMixin):
        pass

    module = Module()
    vars(module)["_compression"] = type("Session", (), {"compressor": Source()})()
    assert float(module.width_loss()) == 2.0
