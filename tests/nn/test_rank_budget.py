"""Ranks under a budget, against numbers from the specification and a brute-force search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.nn.rank_budget import LayerSize, choose_ranks, layer_cost, smallest_size


@pytest.mark.parametrize(
    ("o", "i", "rank"), [(768, 768, 384), (3072, 768, 614.4), (2048, 2048, 1024), (5632, 2048, 1501.87)]
)
def test_break_even_ranks_of_the_specification(o: int, i: int, rank: float) -> None:
    assert LayerSize(i, o).break_even == pytest.approx(rank, abs=0.01)


@pytest.mark.parametrize(
    ("o", "i", "rank"), [(768, 768, 192), (3072, 768, 307), (2048, 2048, 512), (5632, 2048, 750)]
)
def test_ranks_at_half_of_a_layer(o: int, i: int, rank: int) -> None:
    assert int(LayerSize(i, o).break_even / 2) == rank


def test_the_rounded_rank_is_charged() -> None:
    size = LayerSize(100, 100)
    assert layer_cost(size, 17, multiple=16, dense_above=1.0) == 32 * 200
    assert layer_cost(size, 0, multiple=16, dense_above=1.0) == 16 * 200


def test_a_layer_is_charged_dense_where_factors_do_not_pay() -> None:
    size = LayerSize(100, 100)
    assert layer_cost(size, 37, multiple=1, dense_above=0.75) == 7400
    assert layer_cost(size, 38, multiple=1, dense_above=0.75) == 10_000


layers = st.integers(2, 24).flatmap(lambda i: st.integers(2, 24).map(lambda o: LayerSize(i, o)))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(layers, min_size=1, max_size=5),
    multiple=st.sampled_from([1, 2, 4]),
    dense_above=st.sampled_from([0.5, 0.75, 1.0]),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_chosen_ranks_fit_the_budget_and_nothing_better_was_left_out(
    sizes: list[LayerSize], multiple: int, dense_above: float, share: float, seed: int
) -> None:
    named = {str(k): size for k, size in enumerate(sizes)}
    generator = torch.Generator().manual_seed(seed)
    margins = {p: torch.rand(s.full_rank, generator=generator) for p, s in named.items()}
    low, high = smallest_size(named, multiple, dense_above), sum(s.dense for s in sizes)
    budget = int(low + share * (high - low))
    ranks = choose_ranks(margins, named, budget, multiple, dense_above)
    cost = {p: layer_cost(s, ranks[p], multiple, dense_above) for p, s in named.items()}
    assert sum(cost.values()) <= budget
    for path, size in named.items():
        assert ranks[path] == size.full_rank or ranks[path] % multiple == 0
        assert (ranks[path] == size.full_rank) == (cost[path] == size.dense) or size.full_rank <= multiple
        if ranks[path] < size.full_rank:
            step = layer_cost(size, ranks[path] + 1, multiple, dense_above) - cost[path]
            assert sum(cost.values()) + step > budget


def test_larger_margins_get_the_room() -> None:
    sizes = {"wanted": LayerSize(16, 16), "idle": LayerSize(16, 16)}
    margins = {"wanted": torch.full((16,), 2.0), "idle": torch.linspace(1.0, 0.0, 16)}
    ranks = choose_ranks(margins, sizes, budget=256, multiple=1, dense_above=1.0)
    assert ranks["wanted"] > 3 * ranks["idle"]
