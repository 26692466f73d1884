"""Which linears are factorised, how much they may keep, and which structures fit a model."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig, convert, prepare, restore
from lightning_compress.plan import PlanError
from tests.toys import tiny_bert


def config(**settings: Any) -> SoftThresholdRankConfig:
    return SoftThresholdRankConfig(**{"rank_multiple": 1, **settings})


def test_an_unreachable_target_names_the_smallest_one_that_works() -> None:
    with pytest.raises(ValueError, match=r"cannot be reached.*Ask for 0.9"):
        prepare(tiny_bert(vocab_size=20_000), config(target_params=0.1, scope="total"))
    with pytest.raises(ValueError, match="rank_multiple"):
        prepare(tiny_bert(), config(target_params=0.3, rank_multiple=16))


def test_the_smallest_target_that_an_error_names_really_works() -> None:
    with pytest.raises(ValueError, match="Ask for") as error:
        prepare(tiny_bert(), config(target_params=0.01))
    named = float(str(error.value).split("Ask for ")[1].split(" ")[0])
    assert convert(prepare(tiny_bert(), config(target_params=named)))["ranks"]


def test_patterns_choose_the_layers() -> None:
    model = tiny_bert()
    structure = convert(
        prepare(model, config(target_params=0.5, include=("*layer.0*",), exclude=("*query",)))
    )
    assert structure["ranks"] and all("layer.0" in p and "query" not in p for p in structure["ranks"])


def test_patterns_that_match_nothing_are_refused_with_the_paths() -> None:
    with pytest.raises(ValueError, match=r"leave no linear.*query"):
        prepare(tiny_bert(), config(include=("encoder.block*",)))


def test_a_layer_that_is_factorised_already_is_refused() -> None:
    model = tiny_bert()
    handle = prepare(model, config(target_params=0.5))
    with pytest.raises(ValueError, match="factorised already"):
        prepare(model, config(target_params=0.5))
    convert(handle)
    with pytest.raises(ValueError, match="factorised already"):
        prepare(model, config(target_params=0.5))


def test_a_weight_shared_by_two_layers_is_refused() -> None:
    model = tiny_bert()
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.query.weight = first.query.weight
    with pytest.raises(ValueError, match=r"shared by.*Exclude these layers"):
        prepare(model, config(target_params=0.5))


def test_a_linear_of_another_kind_is_refused() -> None:
    model = tiny_bert()

    class Odd(nn.Linear): ...

    model.bert.encoder.layer[0].intermediate.dense = Odd(32, 64)
    with pytest.raises(ValueError, match="Odd, which cannot be factorised"):
        prepare(model, config())


@pytest.mark.parametrize("rank", [0, -1, 33, 10**9, 1.5, True, "4", None])
def test_an_impossible_rank_in_a_structure_is_refused_and_nothing_is_changed(rank: Any) -> None:
    model = tiny_bert()
    names = [n for n, _ in model.named_modules()]
    good, bad = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.query"
    with pytest.raises(PlanError, match="whole numbers from 1 to 32"):
        restore(model, {"ranks": {good: 4, bad: rank}})
    assert [n for n, _ in model.named_modules()] == names


@pytest.mark.parametrize("path", ["bert.encoder.layer.9", "bert.embeddings", "", "__class__"])
def test_a_path_that_is_no_linear_is_refused(path: str) -> None:
    with pytest.raises(PlanError):
        restore(tiny_bert(), {"ranks": {path: 4}})


def test_a_structure_with_other_fields_is_refused() -> None:
    with pytest.raises(PlanError, match="soft_threshold_rank needs"):
        restore(tiny_bert(), {"ranks": {}, "code": "x"})
