"""Wishes in counts and shares, of single widths and of everything together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress.methods.width_config import WidthSlimmingConfig
from lightning_compress.methods.width_plan import plan_widths
from lightning_compress.nn.importance import LayerScores
from lightning_compress.nn.width_costs import Counts
from tests.toys import tiny_bert


def planned(model: Any = None, **wish: Any) -> Any:
    return plan_widths(tiny_bert() if model is None else model, WidthSlimmingConfig(**wish))


def test_counts_are_taken_as_they_are() -> None:
    plan = planned(heads=3, ffn=37, embedding_rank=9)
    assert plan.final == Counts((3, 3), (37, 37), 9) and plan.dense == Counts((4, 4), (64, 64), 32)
    assert plan.steps == 1 and not plan.is_joint


def test_shares_are_rounded_to_multiples() -> None:
    plan = planned(heads=0.6, ffn=0.4, embedding_rank=0.3)
    assert plan.final == Counts((2, 2), (24, 24), 10)
    assert planned(ffn=0.4, ffn_multiple=16).final.neurons_L == (32, 32)


def test_all_of_it_is_not_touched() -> None:
    plan = planned(heads=1.0, ffn=1.0, embedding_rank=32)
    assert plan.final == plan.dense and plan.final.embedding_rank is None


@pytest.mark.parametrize(("heads", "steps"), [(3, 1), (1, 3), (4, 8)])
def test_there_is_a_step_for_each_head_lost(heads: int, steps: int) -> None:
    assert planned(heads=heads, ffn=8).steps == steps
    assert planned(heads=heads, ffn=8, steps=5).steps == 5


def test_with_grouped_queries_heads_leave_in_groups(tiny: Any) -> None:
    model = tiny("llama", "LlamaForSequenceClassification")
    assert planned(model, heads=2).final.heads_L == (1, 1)
    with pytest.raises(ValueError, match=r"heads=3 must be at most 4.*whole groups of 2"):
        planned(model, heads=3)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"heads": 5}, "heads=5 must be at most 4"),
        ({"ffn": 65}, "ffn=65 is more than the 64 neurons"),
        ({"embedding_rank": 33}, "embedding_rank=33 is more than the model has, 32"),
    ],
)
def test_more_than_there_is_is_refused(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**wish)


def test_models_without_heads_and_neurons_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="no attention heads and FFN neurons"):
        planned(tiny("mamba", "MambaForCausalLM"))


def test_competing_layers_share_the_counts_of_their_kind_where_counts_are_given() -> None:
    plan = planned(heads=2, ffn=0.5, ranking="global")
    torch.manual_seed(0)
    scores = [LayerScores(torch.rand(4) + layer, torch.rand(64) + layer) for layer in range(2)]
    kept = [LayerScores(torch.ones(4), torch.ones(64)) for _ in range(2)]
    masks = plan.choose(scores, kept, plan.final, plan.steps, ranking="global")
    assert [int(mask.heads_G.sum()) for mask in masks] == [1, 3]
    assert sum(int(mask.neurons_F.sum()) for mask in masks) == 64


def test_heads_and_neurons_share_one_budget_under_a_target() -> None:
    plan = planned(target_params=0.6, ranking="global")
    scores = [LayerScores(torch.zeros(4), torch.ones(64)) for _ in range(2)]
    kept = [LayerScores(torch.ones(4), torch.ones(64)) for _ in range(2)]
    masks = plan.choose(scores, kept, plan.final, plan.steps, ranking="global")
    assert [int(mask.heads_G.sum()) for mask in masks] == [1, 1]
    counts = Counts((1, 1), tuple(int(mask.neurons_F.sum()) for mask in masks))
    assert plan.costs.of(counts) <= plan.budget < plan.costs.of(Counts((1, 1), (64, 64)))


@pytest.mark.parametrize(
    ("heads", "ffn", "rank", "millions"),
    [
        (8, 2048, 512, 73.16),
        (8, 1024, 512, 54.27),
        (6, 1536, 384, 54.98),
        (4, 1024, 256, 36.81),
        (4, 512, 256, 27.37),
        (3, 768, 192, 27.73),
        (2, 512, 128, 18.64),
        (2, 256, 128, 13.92),
    ],
)
def test_the_sizes_of_the_specification_are_foreseen(
    heads: int, ffn: int, rank: int, millions: float
) -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    plan = planned(model, heads=heads, ffn=ffn, embedding_rank=rank, scope="total")
    # eleven exits of 768 x 2 + 2 more, and no pooler
    expected = plan.costs.of(plan.final) + 11 * 1538 - (768 * 768 + 768)
    assert expected / 1e6 == pytest.approx(millions, abs=0.005)


def test_widths_that_shared_weights_do_not_allow_are_refused_before_training(tiny: Any) -> None:
    with pytest.raises(ValueError, match="hidden width of this BertForMaskedLM cannot change"):
        planned(tiny("bert", "BertForMaskedLM"), hidden=0.5)


def test_a_narrower_hidden_width_leaves_more_of_the_budget_to_the_rest() -> None:
    wide, narrow = planned(target_params=0.5), planned(target_params=0.5, hidden=20)
    assert narrow.final.hidden == 20 and narrow.dense.hidden == 32
    assert (
        narrow.final.neurons_L[0] > wide.final.neurons_L[0] or narrow.final.heads_L[0] > wide.final.heads_L[0]
    )
    assert narrow.budget == wide.budget == 0.5 * wide.dense_cost


def test_an_unreachable_target_beside_a_hidden_width_is_told_in_shares_of_the_model_as_it_was() -> None:
    wish = WidthSlimmingConfig(hidden=16, heads=4, target_params=0.1)
    left = 4 * (16 * 32) + 3 * 32 + 16 + 2 * (16 * 4) + 4 + 16 + 4 * 16  # attention, four neurons, norms
    dense = 4 * (32 * 32 + 32) + 2 * (32 * 64) + 64 + 32 + 4 * 32
    with pytest.raises(
        ValueError,
        match=rf"the target of 0\.1 cannot be reached.* still cost {left / dense:.4f} of the dense",
    ):
        plan_widths(tiny_bert(), wish)
