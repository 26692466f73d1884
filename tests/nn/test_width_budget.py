"""Counts under a budget, and what competes for it, against worked numbers and a brute-force search."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.nn.importance import LayerScores
from lightning_compress.nn.width_budget import choose_counts, choose_kept, default_multiple, keep_best
from lightning_compress.nn.width_costs import Counts, LayerCost, WidthCosts


def test_the_multiple_suits_the_size() -> None:
    assert [default_multiple(size) for size in (3072, 1536, 1024, 384, 64, 16, 4)] == [
        64,
        64,
        64,
        16,
        4,
        1,
        1,
    ]


bert_base = WidthCosts((LayerCost(12, 3072, 196_800.0, 1537.0),) * 12, fixed=12 * 3840.0)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_target_is_met_and_used_up(share: float) -> None:
    counts = choose_counts(bert_base, share * bert_base.dense, multiple=64)
    spare = share * bert_base.dense - bert_base.of(counts)
    assert 0.0 <= spare < 12 * 64 * 1537.0  # one more multiple in each layer would be too much
    heads, neurons = counts.heads_L[0] / 12, counts.neurons_L[0] / 3072
    assert abs(heads - share) <= 1 / 12 and abs(neurons - share) < 0.06
    assert len(set(counts.heads_L)) == len(set(counts.neurons_L)) == 1
    assert all(n % 64 == 0 for n in counts.neurons_L)


def test_embeddings_shrink_with_the_rest_where_they_count() -> None:
    costs = WidthCosts(bert_base.layers, bert_base.fixed, 30522.0 * 768, 30522.0 + 768, 768)
    counts = choose_counts(costs, costs.dense / 8, multiple=64, rank_multiple=32)
    assert 0.0 <= costs.dense / 8 - costs.of(counts) < 12 * 64 * 1537.0
    assert counts.embedding_rank == 96 and counts.heads_L[0] == 1


def test_nothing_is_factored_at_the_full_size() -> None:
    costs = WidthCosts(bert_base.layers, bert_base.fixed, 30522.0 * 768, 30522.0 + 768, 768)
    assert choose_counts(costs, costs.dense, multiple=64) == costs.full


def test_given_widths_stay_and_neurons_fill_the_rest() -> None:
    counts = choose_counts(bert_base, 0.5 * bert_base.dense, heads_L=[3] * 12, multiple=64)
    assert counts.heads_L == (3,) * 12
    assert 0.48 < bert_base.of(counts) / bert_base.dense <= 0.5
    counts = choose_counts(bert_base, 0.5 * bert_base.dense, neurons_L=[512] * 12, multiple=64)
    assert counts.neurons_L == (512,) * 12 and bert_base.of(counts) <= 0.5 * bert_base.dense


def test_a_target_out_of_reach_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(ValueError, match=r"target of 0\.01 cannot be reached.*still cost 0\.04"):
        choose_counts(bert_base, 0.01 * bert_base.dense, multiple=64)
    with pytest.raises(ValueError, match="cannot be reached"):
        choose_counts(bert_base, 0.3 * bert_base.dense, heads_L=[12] * 12, multiple=64)


def test_the_best_stay_ties_go_to_the_lower_index_and_what_left_never_returns() -> None:
    scores = torch.tensor([5.0, 0.0, 5.0, 9.0, 5.0])
    assert keep_best(scores, 2).nonzero().flatten().tolist() == [0, 3]
    kept = torch.tensor([True, True, False, False, True])
    assert keep_best(scores, 2, kept).nonzero().flatten().tolist() == [0, 4]
    assert keep_best(torch.zeros(4), 3).tolist() == [True, True, True, False]


def brute_force(scores: list[LayerScores], costs: WidthCosts, budget: float) -> float:
    """The most worth that fits, over all choices that keep one of everything (multiple 1)."""
    best = -1.0
    heads, neurons = ([len(layer.heads_G) for layer in scores], [len(layer.neurons_F) for layer in scores])
    ranges = [range(1, n + 1) for n in [*heads, *neurons]]
    for choice in itertools.product(*ranges):
        counts = Counts(choice[: len(heads)], choice[len(heads) :])
        if costs.of(counts) <= budget:
            worth = sum(
                float(s.heads_G.sort(descending=True).values[:n].sum())
                for s, n in zip(scores, counts.heads_L, strict=True)
            )
            worth += sum(
                float(s.neurons_F.sort(descending=True).values[:n].sum())
                for s, n in zip(scores, counts.neurons_L, strict=True)
            )
            best = max(best, worth)
    return best


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 1.0))
def test_competing_layers_stay_within_the_budget_and_near_the_best_choice(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [
        LayerScores(torch.rand(3, generator=generator), torch.rand(4, generator=generator)) for _ in range(2)
    ]
    costs = WidthCosts((LayerCost(3, 4, 1.0, 1.0), LayerCost(3, 4, 1.0, 1.0)), fixed=0.0)
    budget = max(share * costs.dense, 4.0)
    masks = choose_kept(scores, costs, budget, multiple=1)
    counts = Counts(
        tuple(int(mask.heads_G.sum()) for mask in masks), tuple(int(mask.neurons_F.sum()) for mask in masks)
    )
    assert costs.of(counts) <= budget and min(*counts.heads_L, *counts.neurons_L) >= 1
    worth = sum(
        float((mask.heads_G * score.heads_G).sum() + (mask.neurons_F * score.neurons_F).sum())
        for mask, score in zip(masks, scores, strict=True)
    )
    assert worth == pytest.approx(
        brute_force(scores, costs, budget), rel=1e-5
    )  # equal costs: greedy is optimal


def test_neurons_leave_in_blocks_and_what_left_never_returns() -> None:
    scores = [
        LayerScores(torch.ones(2), torch.arange(10.0)),
        LayerScores(torch.ones(2), 100 - torch.arange(10.0)),
    ]
    costs = WidthCosts((LayerCost(2, 10, 0.0, 1.0),) * 2, fixed=0.0)
    masks = choose_kept(scores, costs, 14.0, multiple=4, per_cost=False)
    assert [int(mask.neurons_F.sum()) for mask in masks] == [4, 10]
    assert masks[0].neurons_F.nonzero().flatten().tolist() == [6, 7, 8, 9]
    later = choose_kept(scores[::-1], costs, 20.0, multiple=4, kept=masks[::-1], per_cost=False)
    assert torch.equal(later[1].neurons_F, masks[0].neurons_F)


def test_a_budget_below_the_smallest_model_is_refused() -> None:
    scores = [LayerScores(torch.ones(2), torch.ones(8))]
    with pytest.raises(ValueError, match=r"budget of 3 is below 5"):
        choose_kept(scores, WidthCosts((LayerCost(2, 8, 1.0, 1.0),), 0.0), 3.0, multiple=4)
