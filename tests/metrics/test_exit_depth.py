"""Shape legend: B examples, L layers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric, MetricCollection

from lightning_compress.metrics import ExitDepth


def test_the_mean_is_over_examples_not_over_batches():
    metric = ExitDepth(6)
    metric.update(torch.tensor([1, 1, 1, 6]))
    metric.update(torch.tensor([6]))
    assert metric.compute().item() == pytest.approx(15 / 5)
    assert metric.shares_L.tolist() == pytest.approx([3 / 5, 0, 0, 0, 0, 2 / 5])
    assert isinstance(metric, Metric)


@given(st.lists(st.lists(st.integers(1, 5), max_size=6), min_size=1, max_size=5))
def test_any_batching_gives_what_a_plain_count_gives(batches):
    metric, flat = ExitDepth(5), [depth for batch in batches for depth in batch]
    for batch in batches:
        metric.update(torch.tensor(batch, dtype=torch.long))
    assert metric.counts_L.tolist() == [flat.count(depth) for depth in range(1, 6)]
    if flat:
        assert metric.compute().item() == pytest.approx(sum(flat) / len(flat))


def test_processes_are_merged_by_their_counts_and_reset_forgets_them():
    first, second = ExitDepth(3), ExitDepth(3)
    first.update(torch.tensor([1, 1]))
    second.update(torch.tensor([3]))
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(5 / 3)
    first.reset()
    assert first.counts_L.tolist() == [0, 0, 0]


def test_it_can_be_logged_as_one_number():
    metrics = MetricCollection({"depth": ExitDepth(2)})
    metrics.update(torch.tensor([2, 1], dtype=torch.int32))
    assert metrics.compute()["depth"].shape == () and metrics.compute()["depth"] == 1.5


def test_before_the_first_example_there_is_no_number():
    metric = ExitDepth(2)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(metric.compute())


@pytest.mark.parametrize(
    ("depth", "error", "message"),
    [
        ([1.0], TypeError, "float32: give whole numbers of layers"),
        ([True], TypeError, "bool: give whole numbers"),
        ([[1]], ValueError, r"depth_B must be \[B\].*got \[1, 1\]"),
        ([0, 2], ValueError, r"between 1 and 3, got \[0, 2\]"),
        ([4], ValueError, "between 1 and 3"),
    ],
)
def test_impossible_depths_are_refused(depth, error, message):
    metric = ExitDepth(3)
    with pytest.raises(error, match=message):
        metric.update(torch.tensor(depth))
    assert metric.counts_L.tolist() == [0, 0, 0]


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        ExitDepth(0)
