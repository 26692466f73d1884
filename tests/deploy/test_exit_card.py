"""The card of a model with exits says who leaves where, and does not say that the model is smaller."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

from lightning_compress import (
    CompressionPlan,
    Compressor,
    ContributionTokenDroppingConfig,
    MultiExitConfig,
    SoftThresholdRankConfig,
    attach_plan,
    set_exit_threshold,
)
from lightning_compress.deploy import model_card
from lightning_compress.deploy.exit_card import describe_exits, lets_texts_leave
from lightning_compress.nn.flops import count_flops
from lightning_compress.plan import MethodRecord
from tests.toys import tiny_bert


def exiting_bert(*others: Any, **settings: Any) -> tuple[PreTrainedModel, CompressionPlan]:
    model = tiny_bert(num_hidden_layers=4)
    compressor = Compressor(model, [MultiExitConfig(**settings), *others])
    compressor.prepare()
    plan = compressor.convert()
    attach_plan(model, plan)
    return model.eval(), plan


def card_of(model: PreTrainedModel, plan: CompressionPlan) -> str:
    return model_card(model, plan, weight_bytes=1000)


def test_the_card_says_that_texts_leave_and_weights_stay() -> None:
    card = card_of(*exiting_bert(threshold=0.25))
    assert "- multi-exit\n" in card and "`threshold=0.25`" in card
    assert "Texts leave early, weights stay" in card and "Tokens leave" not in card
    assert "opens the dense model, without exits." in card and "random values" not in card
    assert "| FLOPs for one text of 128 tokens, if none leaves |" in card


def test_flops_are_those_of_a_text_that_asks_every_exit_in_vain() -> None:
    dense = count_flops(tiny_bert(num_hidden_layers=4), [128]).total
    for threshold, asked in ((0.25, 3), (None, 0)):
        spent = dense + asked * 2 * 32 * 2
        assert f"if none leaves | {dense:,.0f} | {spent:,.0f} |" in card_of(
            *exiting_bert(threshold=threshold)
        )


def test_exits_that_are_asked_and_the_threshold_are_those_in_force() -> None:
    model, plan = exiting_bert(threshold=0.25)
    set_exit_threshold(model, 0.375, exits=[0, 2])
    card = card_of(model, plan)
    assert "| exit after layer | 0 | 1 | 2 |" in card
    assert "| asked | yes | no | yes |" in card
    assert "| FLOPs if asked | 128 | 128 | 128 |" in card
    assert "The threshold is 0.375: the larger it is, the earlier texts leave." in card
    set_exit_threshold(model, None)
    assert "The threshold lets nobody leave early, and every text runs all layers." in card_of(model, plan)


def test_a_threshold_of_probabilities_falls_for_earlier_exits() -> None:
    assert "The threshold is 0.9: the smaller it is" in card_of(*exiting_bert(rule="max_prob", threshold=0.9))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {},
            "There is an exit after layers 0, 1, 2, counted from 0: `tanh` and a linear layer on the mean over",
        ),
        ({"exits": (1,)}, "There is an exit after layer 1, counted from 0"),
        ({"pooler": True}, "counted from 0: a dense layer, `tanh` and a linear layer"),
        ({"pooling": "cls"}, "on the first token"),
        (
            {"normalized": True},
            "the entropy of its answer, as a share of that of equal probabilities, is below",
        ),
        ({"rule": "patience"}, "as many exits in a row as the threshold says agree"),
        ({"rule": "learned"}, "guesses the chance that it is wrong"),
    ],
)
def test_the_structure_is_told_in_words(settings: dict[str, Any], words: str) -> None:
    model, plan = exiting_bert(**settings)
    assert words in describe_exits(model, plan.methods[0].structure)


def test_tokens_and_texts_that_leave_are_both_told() -> None:
    card = card_of(*exiting_bert(ContributionTokenDroppingConfig(), threshold=0.25))
    assert "Texts leave early" in card and "Tokens leave, weights stay" in card
    assert "opens the dense model, in which no token leaves and without exits." in card


def test_beside_smaller_layers_nobody_opens_the_dense_model() -> None:
    card = card_of(*exiting_bert(SoftThresholdRankConfig(target_params=0.5, rank_multiple=4)))
    assert "leaves the compressed layers at random values" in card


def test_exits_that_share_a_decoders_head_let_no_text_leave() -> None:
    structure = {"exits": [0, 1], "shared": True}
    words = describe_exits(tiny_bert(), structure)
    assert "assistant_early_exit" in words and "every token runs all layers" in words
    plan = CompressionPlan("gpt2", (MethodRecord("multi_exit", "converted", {}, structure),))
    assert not lets_texts_leave(plan)
    card = card_of(tiny_bert(), plan)
    assert "opens the dense model." in card and "Texts leave" not in card and "if none leaves" not in card
