"""Shape legend: B sequences, T padded length, D hidden size."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import set_exit_threshold
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.multi_exit import ExitHead
from lightning_compress.nn.surgery import get_module
from lightning_compress.runtime.static import StaticEncoder, make_static
from lightning_compress.runtime.static_exit import StaticExit
from tests.runtime.conftest import FAMILIES, ragged
from tests.toys import tiny_bert
from tests.toys_exits import exiting_model

LENGTHS = [9, 4, 12, 1]


def bert(**settings: Any) -> Any:
    return exiting_model(
        tiny_bert(num_hidden_layers=3, vocab_size=50, initializer_range=0.3), **settings
    ).double()


def by_hand(model: Any, batch: dict[str, Tensor], layer: int) -> Tensor:
    """One text at a time, unpadded, by the family's own layers and the exit's own weights."""
    anatomy, head, answers = describe(model), model.exits[str(layer)], []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        hidden_1TD = get_module(model, anatomy.embeddings)(ids[None, : int(mask.sum())])
        for part in anatomy.layers[: layer + 1]:
            hidden_1TD = get_module(model, part.path)(hidden_1TD)
        pooled_1D = hidden_1TD[:, 0] if head.pooling == "cls" else hidden_1TD.mean(1)
        pooled_1D = pooled_1D if head.pooler is None else head.pooler(pooled_1D)
        answers.append(head.classifier(pooled_1D.tanh()))
    return torch.cat(answers)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("settings", [{}, {"pooling": "mean"}, {"pooling": "mean", "pooler": True}])
def test_all_texts_answer_by_the_exit_that_is_named(settings, layer):
    model, batch = bert(**settings), ragged(LENGTHS)
    static = make_static(model, exit_layer=layer)
    expected = by_hand(model, batch, layer)
    torch.testing.assert_close(static(**batch).logits, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(make_static(model)(**batch).logits, expected)
    assert not torch.allclose(make_static(model, exit_layer=1 - layer)(**batch).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_packed_engine_says_of_texts_that_leave_there(classifier, family):
    model, batch = exiting_model(classifier(family)), ragged(LENGTHS)
    set_exit_threshold(model, math.log(2))  # everybody is sure enough at the first exit
    packed = model(**batch)
    assert packed.exit_depth.tolist() == [1] * len(LENGTHS)
    torch.testing.assert_close(
        make_static(model, exit_layer=0)(**batch).logits, packed.logits, rtol=1e-9, atol=1e-9
    )


@torch.no_grad()
def test_tokens_that_were_dropped_count_in_no_mean():
    dense = tiny_bert(num_hidden_layers=3, vocab_size=50, initializer_range=0.3)
    model = exiting_model(dense, ContributionTokenDroppingConfig(), pooling="mean").double()
    batch = ragged([12, 3])
    all_stay = make_static(model, (12, 12, 12), exit_layer=1)(**batch).logits
    torch.testing.assert_close(all_stay, by_hand(model, batch, 1), rtol=1e-9, atol=1e-9)
    some_stay = make_static(model, (12, 3, 3), exit_layer=1)(**batch).logits
    torch.testing.assert_close(some_stay[1], all_stay[1], rtol=1e-9, atol=1e-9)  # it had three tokens
    assert not torch.allclose(some_stay[0], all_stay[0])


def test_layers_after_the_exit_are_not_in_the_copy():
    model = bert()
    static = make_static(model, exit_layer=0)
    (encoder,) = (module for module in static.modules() if isinstance(module, StaticEncoder))
    assert len(encoder.layer) == 1
    assert len(describe(model).layers) == 3
    for part in static.exits["0"].parameters():
        nn.init.zeros_(part)
    batch = ragged([5])
    twin = copy.deepcopy(static)
    assert static(**batch).logits.abs().sum() == 0
    nn.init.ones_(twin.exits["0"].classifier.bias)
    assert twin(**batch).logits.tolist() == [[1.0, 1.0]]
    assert static(**batch).logits.abs().sum() == 0  # a copy answers by its own exit


def test_exits_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="the model has no exits: train it with MultiExit"):
        make_static(tiny_bert(), exit_layer=0)
    for layer in (-1, 2, 7):
        with pytest.raises(ValueError, match=rf"exit {layer} is not after one of the layers 0, 1: "):
            make_static(bert(), exit_layer=layer)


def test_an_answer_is_given_once():
    answer = StaticExit(ExitHead(4, 2))
    answer.give(torch.ones(3, 1, 4), torch.ones(3, 1, dtype=torch.bool))
    assert answer() is not None
    assert answer() is None
