import pytest
import torch
from torchmetrics import Metric

from lightning_compress.metrics import Speedup


def test_the_speedup_is_the_ratio_of_totals_not_the_mean_of_ratios():
    metric = Speedup()
    metric.update(dense_flops=900.0, compressed_flops=100.0)
    metric.update(dense_flops=100.0, compressed_flops=100.0)
    assert metric.compute().item() == 5.0


def test_tensors_of_per_example_flops_are_summed():
    metric = Speedup()
    metric.update(torch.tensor([300.0, 500.0]), torch.tensor([[100, 100]]))
    assert metric.compute().item() == 4.0


def test_totals_stay_exact_where_single_precision_would_not():
    metric = Speedup()
    for _ in range(3):
        metric.update(dense_flops=2.0**40 + 1, compressed_flops=2.0**40 + 1)
    assert metric.dense_flops.item() == 3 * (2**40 + 1)
    assert metric.compute().item() == 1.0


def test_processes_are_merged_by_their_totals():
    first, second = Speedup(), Speedup()
    first.update(900.0, 100.0)
    second.update(100.0, 100.0)
    first.merge_state(second)
    assert first.compute().item() == 5.0


def test_the_state_survives_saving_when_asked_to_persist_and_reset_forgets_it():
    metric, twin = Speedup(), Speedup()
    metric.persistent(True)
    metric.update(300.0, 100.0)
    twin.persistent(True)
    twin.load_state_dict(metric.state_dict())
    twin.update(100.0, 100.0)
    assert twin.compute().item() == 2.0
    metric.reset()
    assert metric.dense_flops.item() == 0


def test_a_forward_call_returns_the_value_of_its_own_batch():
    metric = Speedup()
    metric.update(900.0, 100.0)
    assert metric(200.0, 100.0).item() == 2.0
    assert metric.compute().item() == 5.5
    assert isinstance(metric, Metric)


@pytest.mark.parametrize(("dense", "compressed", "name"), [(0, 1, "dense"), (1, -2, "compressed")])
def test_counts_below_one_are_refused_and_nothing_is_added(dense, compressed, name):
    metric = Speedup()
    with pytest.raises(ValueError, match=f"{name}_flops must be a finite number of FLOPs, at least 1"):
        metric.update(float(dense), float(compressed))
    assert metric.dense_flops.item() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_counts_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="finite"):
        Speedup().update(torch.tensor(value), 1.0)
