"""The private optimizer of thresholds and multipliers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.auxiliary import AuxiliaryOptimizer
from lightning_compress.methods import AuxiliaryGroup


def owner(lr: float, value: float = 1.0, max_norm: float | None = None) -> Any:
    parameter = nn.Parameter(torch.tensor(value))
    return SimpleNamespace(
        auxiliary_groups=lambda: [AuxiliaryGroup([parameter], lr, max_norm)], parameter=parameter
    )


def test_each_method_gets_the_learning_rate_it_asks_for() -> None:
    fast, slow = owner(0.1), owner(0.01)
    optimizer = AuxiliaryOptimizer([fast, slow])
    (fast.parameter + slow.parameter).backward()
    optimizer.step()
    assert float(fast.parameter.detach()) == pytest.approx(0.9)
    assert float(slow.parameter.detach()) == pytest.approx(0.99)


def test_a_resting_method_neither_moves_nor_gathers_moments() -> None:
    idle = owner(0.0)
    optimizer = AuxiliaryOptimizer([idle])
    idle.parameter.backward()
    optimizer.step()
    assert float(idle.parameter.detach()) == 1.0 and idle.parameter.grad is None
    assert not optimizer.optimizer.state


def test_a_spike_is_clipped_for_the_group_that_asks_for_it() -> None:
    calm, free = owner(0.1, max_norm=1.0), owner(0.1)
    optimizer = AuxiliaryOptimizer([calm, free])
    (1000 * (calm.parameter + free.parameter)).backward()
    optimizer.step()
    moments = [optimizer.optimizer.state[h.parameter]["exp_avg"].item() for h in (calm, free)]
    assert moments == pytest.approx([0.1, 100.0], rel=1e-4)


def test_gradients_are_cleared_after_the_step() -> None:
    handle = owner(0.1)
    optimizer = AuxiliaryOptimizer([handle])
    handle.parameter.backward()
    optimizer.step()
    assert handle.parameter.grad is None


def test_no_auxiliary_parameters_need_no_optimizer() -> None:
    empty = SimpleNamespace(auxiliary_groups=list)
    optimizer = AuxiliaryOptimizer([empty])
    optimizer.step()
    assert optimizer.optimizer is None and optimizer.state_dict() is None


def test_a_loaded_state_goes_on_exactly() -> None:
    one, two = owner(0.1), owner(0.1)
    first, second = AuxiliaryOptimizer([one]), AuxiliaryOptimizer([two])
    for _ in range(3):
        (one.parameter**2).backward()
        first.step()
    with torch.no_grad():
        two.parameter.copy_(one.parameter)
    second.load_state_dict(first.state_dict())
    for handle, optimizer in ((one, first), (two, second)):
        (handle.parameter**2).backward()
        optimizer.step()
    assert torch.equal(one.parameter, two.parameter)


def test_forgotten_moments_start_afresh() -> None:
    handle = owner(0.1)
    optimizer = AuxiliaryOptimizer([handle])
    handle.parameter.backward()
    optimizer.step()
    optimizer.forget([handle.parameter])
    assert not optimizer.optimizer.state


def test_an_fp16_scale_is_taken_out_of_the_gradients() -> None:
    handle = owner(0.1)
    optimizer, scaler = AuxiliaryOptimizer([handle]), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    (1024.0 * 3.0 * handle.parameter).backward()
    optimizer.step(scaler)
    (state,) = optimizer.optimizer.state.values()
    assert float(state["exp_avg"]) == pytest.approx(0.3)


def test_gradients_under_an_fp16_scaler_are_unscaled_and_overflows_skipped() -> None:
    scaled, plain = owner(0.1), owner(0.1)
    optimizer, reference = AuxiliaryOptimizer([scaled]), AuxiliaryOptimizer([plain])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (3.0, float("inf"), 0.5):
        scaler.scale(scaled.parameter**2 * factor).backward()
        optimizer.step(scaler)
        scaler.update()
        if factor != float("inf"):
            (plain.parameter**2 * factor).backward()
            reference.step()
    assert torch.equal(scaled.parameter, plain.parameter)
    assert scaler.get_scale() == 512.0


def test_moments_are_forgotten_while_a_loaded_state_waits() -> None:
    one, two = owner(0.1), owner(0.1)
    first, second = AuxiliaryOptimizer([one]), AuxiliaryOptimizer([two])
    one.parameter.backward()
    first.step()
    second.load_state_dict(first.state_dict())
    second.forget([two.parameter])
    assert second.optimizer is not None and not second.optimizer.state
