"""Shape legend: B sequences, L layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import Metric

from lightning_compress.metrics import TokensKept

KEPT_BL, LENGTHS_B = torch.tensor([[8, 4, 1], [2, 2, 1]]), torch.tensor([8, 2])


def test_the_share_is_the_ratio_of_totals_not_the_mean_of_ratios():
    metric = TokensKept(3)
    metric.update(KEPT_BL, LENGTHS_B)
    assert metric.compute().tolist() == pytest.approx([10 / 10, 6 / 10, 2 / 10])
    metric.update(torch.tensor([[5, 4, 3]]), torch.tensor([10]))
    assert metric.compute().tolist() == pytest.approx([15 / 20, 10 / 20, 5 / 20])
    assert isinstance(metric, Metric)


def test_totals_stay_exact_where_single_precision_would_not():
    metric = TokensKept(1)
    metric.update(torch.tensor([[2**30 + 1]]), torch.tensor([2**30 + 1]))
    assert metric.kept_L.tolist() == [2**30 + 1]


def test_whole_numbers_may_come_as_floats():
    metric = TokensKept(3)
    metric.update(KEPT_BL.double(), LENGTHS_B.float())
    assert metric.kept_L.tolist() == [10, 6, 2]


def test_processes_are_merged_by_their_totals_and_reset_forgets_them():
    first, second = TokensKept(2), TokensKept(2)
    first.update(torch.tensor([[9, 3]]), torch.tensor([9]))
    second.update(torch.tensor([[0, 0]]), torch.tensor([1]))
    first.merge_state(second)
    assert first.compute().tolist() == pytest.approx([0.9, 0.3])
    first.reset()
    assert (first.kept_L.tolist(), first.total.item()) == ([0, 0], 0)


@given(st.lists(st.tuples(st.integers(1, 50), st.data()), min_size=1, max_size=5))
def test_the_order_and_the_batching_of_sequences_do_not_matter(sequences):
    lengths = [length for length, _ in sequences]
    kept = [[data.draw(st.integers(0, length)) for _ in range(2)] for length, data in sequences]
    together, apart = TokensKept(2), TokensKept(2)
    together.update(torch.tensor(kept), torch.tensor(lengths))
    for counts, length in reversed(list(zip(kept, lengths, strict=True))):
        apart.update(torch.tensor([counts]), torch.tensor([length]))
    assert torch.equal(together.compute(), apart.compute())
    slow = [sum(counts[layer] for counts in kept) / sum(lengths) for layer in range(2)]
    assert together.compute().tolist() == pytest.approx(slow)


@pytest.mark.parametrize(
    ("kept", "lengths", "message"),
    [
        ([[3, 2]], [4], r"kept_BL must be \[B, 3\]"),
        ([[3, 2, 1]], [4, 4], r"got \[1, 3\] and \[2\]"),
        ([[3, 2, 1]], [[4]], r"got \[1, 3\] and \[1, 1\]"),
        ([[5, 2, 1]], [4], "between 0 and the length of its sequence"),
        ([[3, 2, -1]], [4], "between 0 and the length of its sequence"),
        ([[0, 0, 0]], [0], "lengths_B must be at least 1, got 0"),
        ([[3.5, 2.0, 1.0]], [4], "kept_BL must hold whole numbers of tokens"),
        ([[float("nan"), 2.0, 1.0]], [4], "kept_BL must hold whole numbers of tokens"),
        ([[3, 2, 1]], [4.5], "lengths_B must hold whole numbers of tokens"),
    ],
)
def test_impossible_counts_are_refused_and_nothing_is_added(kept, lengths, message):
    metric = TokensKept(3)
    with pytest.raises(ValueError, match=message):
        metric.update(torch.tensor(kept), torch.tensor(lengths))
    assert metric.total.item() == 0


def test_an_encoder_without_layers_is_refused():
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        TokensKept(0)
