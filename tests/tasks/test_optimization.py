import pytest
import torch
from torch import nn

from lightning_compress.tasks.optimization import parameter_groups, warmup_then_decay


def test_matrices_decay_and_biases_and_norms_do_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    decayed, spared = parameter_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3), (5, 4)]
    assert [p.shape for p in spared["params"]] == [(4,), (4,), (4,)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out_and_no_group_is_empty():
    model = nn.Linear(3, 4)
    model.weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert (len(group["params"]), group["weight_decay"]) == (1, 0.0)


def test_a_parameter_that_its_model_marks_does_not_decay():
    model = nn.Linear(3, 4, bias=False)
    model.weight._no_weight_decay = True
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.0


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_then_decay(optimizer, 10, 0.2)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.0, 1.0, *(2.0 * left / 8 for left in range(8, 0, -1))])
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_a_training_without_end_is_refused():
    with pytest.raises(ValueError, match="set `max_epochs` or `max_steps`"):
        warmup_then_decay(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), float("inf"), 0.1)
