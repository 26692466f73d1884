"""The card of a model that drops tokens says what leaves, and does not say that the model is smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lightning_compress import set_threshold_scale
from lightning_compress.deploy import model_card, plan_of
from lightning_compress.deploy.dropping_card import describe_dropping, flops_of_text
from lightning_compress.deploy.model_card import read_measurements
from lightning_compress.nn.flops import count_flops
from lightning_compress.runtime import packed_encoder
from tests.toys import tiny_bert
from tests.toys_dropping import dropping_bert

ORIGIN = {"command": "make bench", "machine": "2 cores", "versions": "torch 2.8"}


def card_of(model: PreTrainedModel, *rows: dict[str, Any]) -> str:
    plan = plan_of(model)
    assert plan is not None
    measurements = read_measurements({**ORIGIN, "rows": rows}) if rows else ()
    return model_card(model, plan, weight_bytes=1000, measurements=measurements)


def described(method: str = "contribution_token_dropping", **changes: Any) -> str:
    model = dropping_bert()
    plan = plan_of(model)
    assert plan is not None
    return describe_dropping(model, {**plan.methods[0].structure, **changes}, method)


def test_the_card_says_that_tokens_leave_and_weights_stay() -> None:
    card = card_of(dropping_bert({"target_flops": 0.4}))
    assert "- contribution-token-dropping\n" in card
    assert "Tokens leave, weights stay" in card
    assert "opens the dense model, in which no token leaves" in card and "random values" not in card
    assert "`target_flops=0.4`" in card and "=None`" not in card


def test_flops_are_those_of_a_text_that_loses_none_with_the_predictors() -> None:
    model = dropping_bert()
    policy: Any = packed_encoder(model).policy  # type: ignore[union-attr]
    dense = count_flops(tiny_bert(), [128]).total
    scored = 128 * sum(policy.flops_per_token_of(layer) for layer in range(2))
    assert flops_of_text(model, 128) == dense + scored
    row = f"| FLOPs for one text of 128 tokens, if none leaves | {dense:,.0f} | {dense + scored:,.0f} |"
    assert row in card_of(model)


def test_the_thresholds_are_those_in_force() -> None:
    model = dropping_bert()
    policy: Any = packed_encoder(model).policy  # type: ignore[union-attr]
    with torch.no_grad():
        policy.eta_K.copy_(torch.tensor([0.5, 0.25]))
    set_threshold_scale(model, 1.5)
    card = card_of(model)
    assert "| layer | 0 | 1 |\n| --- | --- | --- |\n| threshold | 0.750 | 0.375 |" in card
    assert "`lightning_compress.set_threshold_scale(model, 1.5)` is what is set now" in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Tokens may leave before layers 0, 1, counted from 0."),
        ({"layers": [1]}, "Tokens may leave before layer 1, counted from 0."),
        ({"predictor_width": 7}, "a small network (7 neurons)"),
        ({}, "The first token never leaves."),
        ({"protect_first": 3}, "The first 3 tokens never leave."),
        ({"protect_tokens": [102, 0]}, "never leaves; nor do tokens with the ids 102, 0."),
    ],
)
def test_the_structure_is_told_in_words(changes: dict[str, Any], words: str) -> None:
    assert words in described(**changes)


def test_samplers_have_a_rule_of_their_own() -> None:
    assert "log odds of being needed" in described("bottleneck_token_dropping")


def test_a_measured_share_of_tokens_is_told_without_the_dense_one() -> None:
    dense, small = {"model": "dense", "tokens_kept": 1.0}, {"model": "a", "tokens_kept": 0.432}
    assert "Measured below: 43.2 % of the tokens enter a layer" in card_of(dropping_bert(), dense, small)
    more = {"model": "b", "tokens_kept": 0.25}
    assert "Measured below: 25.0 % to 43.2 % of" in card_of(dropping_bert(), dense, small, more)
    assert "Measured below" not in card_of(dropping_bert(), dense)
    assert "Measured below" not in card_of(dropping_bert())
