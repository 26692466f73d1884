"""What widths cost, against counted models, and the steps of a schedule, against the specification."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.nn.surgery import Ledger
from lightning_compress.nn.width_costs import Counts, WidthCosts
from lightning_compress.nn.width_surgery import Widths, apply_widths
from tests.toys import CLASSIFIERS, tiny_bert


@pytest.mark.parametrize("scope", ["linear", "encoder", "total"])
@pytest.mark.parametrize(("model_type", "class_name"), CLASSIFIERS)
def test_the_formula_counts_what_the_cut_model_has(
    model_type: str, class_name: str, scope: Any, tiny: Any
) -> None:
    model = tiny(model_type, class_name)
    parameters, flops = WidthCosts.in_parameters(model, scope), WidthCosts.in_flops(model, 9)
    assert parameters.dense == getattr(count_parameters(model), scope)
    counts = Counts((1, 2), (12, 30), 6 if scope == "total" else None)
    widths = Widths(
        heads=((0,), (0, 1)),
        neurons=(tuple(range(12)), tuple(range(30))),
        embedding_rank=counts.embedding_rank,
    )
    apply_widths(model, widths, Ledger(model))
    assert parameters.of(counts) == getattr(count_parameters(model), scope)
    assert flops.of(counts) == sum(count_flops(model, [9]).layers)


def test_a_cut_model_is_counted_as_it_is() -> None:
    model = tiny_bert()
    before = WidthCosts.in_parameters(model, "encoder")
    apply_widths(model, Widths(heads=((1,), None), neurons=(None, (0, 5))), Ledger(model))
    after = WidthCosts.in_parameters(model, "encoder")
    assert after.full == Counts((1, 4), (64, 2))
    assert after.dense == before.of(after.full)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_schedule_ends_at_its_target_and_never_rises(steps: int) -> None:
    dense, final = Counts((12, 12), (3072, 3072), 768, 768), Counts((2, 5), (256, 1000), 128, 512)
    stages = [final.step(dense, done, steps) for done in range(steps + 1)]
    assert stages[0] == dense and stages[-1] == final
    for before, after in itertools.pairwise(stages):
        assert all(a >= b for a, b in zip(before.neurons_L, after.neurons_L, strict=True))


@pytest.mark.parametrize("done", range(11))
def test_a_schedule_takes_the_official_steps(done: int) -> None:
    stage = Counts((2,), (256,), 128).step(Counts((12,), (3072,), 768), done, 10)
    assert stage.heads_L == (12 - done,)
    assert stage.neurons_L == (int(3072 - (3072 - 256) * done / 10),)
    assert stage.embedding_rank == int(768 - (768 - 128) * done / 10)
