"""What passes cost, where the target is, and how a threshold is led to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_compress.methods.cost_target import CostTarget
from lightning_compress.nn.kept_flops import DroppingCosts, count_kept_flops
from tests.toys import tiny_bert

COUNTS_BL, LENGTHS_B = torch.tensor([[6, 3], [4, 2]]), torch.tensor([6, 5])


def measured(
    goal: CostTarget, counts_BL: Any = COUNTS_BL, progress: float = 0.01, **settings: Any
) -> CostTarget:
    goal.measure(tiny_bert(), progress, torch.as_tensor(counts_BL), LENGTHS_B, **settings)
    goal.end_pass()
    return goal


def test_the_target_falls_geometrically_and_stands_still_for_the_last_fifth_of_the_search() -> None:
    goal = CostTarget(0.25, "flops", start=0.2, end=0.7)
    assert [goal.scheduled(p) for p in (0.0, 0.2, 0.4, 0.6, 0.7, 1.0)] == pytest.approx(
        [1.0, 1.0, 0.5, 0.25, 0.25, 0.25]
    )


def test_tokens_are_those_in_all_layers_over_those_of_dense_layers() -> None:
    goal = measured(CostTarget(0.5, "tokens", 0.0, 1.0))
    assert goal.ratio == goal.tokens_kept == pytest.approx(15 / 22)
    assert goal.excess(1.0) == pytest.approx(15 / 11 - 1)


def test_flops_are_counted_as_everywhere() -> None:
    goal, model = measured(CostTarget(0.5, "flops", 0.0, 1.0)), tiny_bert()
    spent = count_kept_flops(model, COUNTS_BL, LENGTHS_B).sum()
    dense = count_kept_flops(model, LENGTHS_B[:, None].expand(2, 2), LENGTHS_B).sum()
    assert goal.ratio == pytest.approx(float(spent / dense)) and goal.tokens_kept == pytest.approx(15 / 22)


def test_the_ratio_returned_is_differentiable_in_the_counts() -> None:
    counts_BL = COUNTS_BL.float().requires_grad_()
    CostTarget(0.5, "flops", 0.0, 1.0).measure(tiny_bert(), 0.0, counts_BL, LENGTHS_B).backward()
    assert bool((counts_BL.grad > 0).all())


def test_recent_passes_are_pooled_as_sums_that_fade() -> None:
    goal = measured(measured(CostTarget(0.5, "tokens", 0.0, 1.0)), [[6, 6], [5, 5]])
    assert goal.ratio == pytest.approx((0.9 * 15 + 22) / (0.9 * 22 + 22))
    before = goal.ratio
    goal.end_pass()  # nothing new
    assert goal.ratio == before


@pytest.mark.parametrize(("kept", "sign"), [([[6, 6], [5, 5]], 1), ([[1, 1], [1, 1]], -1)])
def test_the_threshold_moves_against_the_error_and_never_further_than_allowed(kept: Any, sign: int) -> None:
    goal = measured(CostTarget(0.5, "tokens", 0.0, 1.0), kept)
    assert goal.correction(1.0, largest=0.7) == 0.7 * sign  # where the cost does not react
    goal = measured(
        CostTarget(0.5, "tokens", 0.0, 1.0), kept, sensitivity=(torch.tensor(3.0), torch.tensor(12.0))
    )
    share = sum(map(sum, kept)) / 22
    newton = (share / 0.5 - 1) / (3 / 12)
    assert goal.correction(1.0, largest=99.0) == pytest.approx(0.2 * newton)


def test_in_a_short_run_sums_fade_faster_and_steps_are_longer() -> None:
    goal = measured(CostTarget(0.5, "tokens", 0.0, 1.0), progress=0.0)
    goal = measured(goal, [[6, 6], [5, 5]], progress=0.1, sensitivity=(torch.tensor(1.0), torch.tensor(1.0)))
    assert goal.ratio == pytest.approx((0.4 * 15 + 22) / (0.4 * 22 + 22))
    assert goal.correction(1.0, largest=99.0) == pytest.approx(0.5)
    goal = measured(goal, progress=0.1)  # a second pass of the same step
    assert goal.ratio == pytest.approx((0.4 * (0.4 * 15 + 22) + 15) / (0.4 * (0.4 * 22 + 22) + 22))


def test_steps_are_those_between_updates_where_nothing_was_measured_too() -> None:
    goal = CostTarget(0.5, "tokens", 0.0, 1.0)
    for progress in (0.0, 0.3, 0.4):
        goal.advance(progress)
    measured(measured(goal, progress=0.4), [[6, 6], [5, 5]], progress=0.4)
    assert goal.totals[0] == pytest.approx(0.4 * 15 + 22)


def test_a_second_run_that_begins_at_zero_has_steps_of_its_own() -> None:
    goal = CostTarget(0.5, "tokens", 0.0, 1.0)
    for progress in (0.0, 0.99, 1.0, 0.0, 0.1):
        goal.advance(progress)
    measured(measured(goal, progress=0.1), [[6, 6], [5, 5]], progress=0.1)
    assert goal.totals[0] == pytest.approx(0.4 * 15 + 22)


@pytest.mark.parametrize("unit", ["flops", "tokens"])
def test_totals_are_exact_where_float32_is_not(unit: Any) -> None:
    goal, model = CostTarget(0.5, unit, 0.0, 1.0), tiny_bert()
    many = 2**24 + 1  # the first whole number that float32 skips
    goal.measure(model, 0.0, torch.tensor([[1.0]]), torch.tensor([many]))
    goal.end_pass()
    assert goal.totals[2:4] == [1, many]


def test_costs_are_counted_now_and_then_and_where_the_search_begins_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted, of = [], DroppingCosts.of
    monkeypatch.setattr(
        DroppingCosts, "of", lambda model, **settings: counted.append(progress) or of(model, **settings)
    )
    goal, model = CostTarget(0.5, "flops", start=0.201, end=0.707), tiny_bert()
    for number in range(1000):
        progress = number / 1000
        goal.measure(model, progress, COUNTS_BL, LENGTHS_B)
    assert len(counted) == 2 * 52 and {0.0, 0.201, 0.5, 0.707} <= set(counted)


def test_passes_over_long_texts_weigh_more_so_that_the_ratio_of_totals_is_met() -> None:
    goal, moved = CostTarget(0.5, "tokens", 0.0, 1.0), []
    for step in range(200):
        kept, length = ((8, 10), (12, 30))[step % 2]  # 20 of 40 together, though 0.8 and 0.4 alone
        sensitivity = torch.tensor(1.0), torch.tensor(2.0)
        counts_BL, lengths_B = torch.tensor([[kept]]), torch.tensor([length])
        goal.measure(tiny_bert(), 0.001 * step, counts_BL, lengths_B, sensitivity)
        goal.end_pass()
        moved.append(goal.correction(1.0, largest=9.0))
    assert moved[-2] == pytest.approx(-moved[-1], rel=0.1) and abs(moved[-1]) > 0.05
    assert goal.excess(1.0) == pytest.approx(0.0, abs=0.05)


def test_without_a_target_nothing_is_to_be_met_and_nothing_moves() -> None:
    goal = measured(CostTarget(None, "flops", 0.0, 1.0))
    assert goal.is_met and goal.excess(0.5) == 0.0 and goal.correction(0.5, largest=1.0) == 0.0


def test_a_target_is_met_up_to_a_tenth() -> None:
    goal = measured(CostTarget(15 / 22 / 1.09, "tokens", 0.0, 1.0))
    assert goal.is_met and not measured(CostTarget(15 / 22 / 1.11, "tokens", 0.0, 1.0)).is_met


def test_the_state_survives_a_round_trip() -> None:
    goal, other = measured(CostTarget(0.5, "flops", 0.0, 1.0)), CostTarget(0.5, "flops", 0.0, 1.0)
    other.load_state_dict(goal.state_dict())
    assert other.state_dict() == goal.state_dict() and other.ratio == goal.ratio < 1.0
    other.measure(tiny_bert(intermediate_size=8), 0.01, COUNTS_BL, LENGTHS_B)
    other.end_pass()  # costs are those that were counted before the state was saved
    assert other.latest == goal.latest
