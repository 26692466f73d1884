"""Choosing, sweeping and setting the threshold of exits."""

import math

import pytest
import torch
from torch import nn

from lightning_compress.runtime import pack, packed_encoder
from lightning_compress.runtime.exit_dial import (
    choose_exit_threshold,
    exit_rule_of,
    exit_threshold,
    set_exit_threshold,
    sweep_exit_threshold,
)
from lightning_compress.runtime.exit_trial import ExitTrial
from tests.runtime.test_exit_trial import LAYERS, LENGTHS, exiting_bert, measured
from tests.toys import tiny_bert
from tests.toys_exits import labelled_batches

EACH_RULE = pytest.mark.parametrize("rule", ["entropy", "max_prob", "margin", "patience", "learned"])


@pytest.fixture
def batches():
    return labelled_batches(LENGTHS * 3)


def points_of(model, batches, exits=None):
    trial = ExitTrial(model, batches)
    return [
        trial.at(threshold, exits) for threshold in trial.thresholds(trial.layers if exits is None else exits)
    ]


def test_the_threshold_is_set_and_read(batches):
    model = exiting_bert()
    set_exit_threshold(model, 0.25, exits=[0, 2])
    assert exit_threshold(model) == 0.25
    assert exit_rule_of(model).asked_layers() == [0, 2]
    set_exit_threshold(model, 0.5)
    assert exit_rule_of(model).asked_layers() == [0, 2]
    set_exit_threshold(model, None)
    assert exit_threshold(model) == 0.0 and exit_rule_of(model).asked_layers() == []


def test_patience_refuses_to_leave_exits_out():
    model = exiting_bert("patience")
    with pytest.raises(ValueError, match="compares each exit with those before it"):
        set_exit_threshold(model, 1, exits=[0])
    assert exit_threshold(model) == math.inf
    set_exit_threshold(model, 1, exits=exit_rule_of(model).layers)
    assert exit_threshold(model) == 1


def test_models_in_training_form_and_modules_that_hold_one_have_a_threshold_too():
    model = exiting_bert()
    set_exit_threshold(nn.Sequential(model), 0.25)
    assert exit_threshold(model) == 0.25
    plain = tiny_bert()
    plain.exit_rule = exit_rule_of(model)
    assert exit_threshold(nn.Sequential(plain)) == 0.25


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        ("entropy", {"threshold": -0.1}, r"threshold=-0.1 .* outside"),
        ("max_prob", {"threshold": 1.5}, r"outside \[0.5, 1\]"),
        (
            "entropy",
            {"threshold": 0.5, "exits": [0, 3]},
            r"names layers \[3\], but exits are after \[0, 1, 2\]",
        ),
    ],
)
def test_settings_out_of_range_are_refused_and_change_nothing(rule, settings, message):
    model = exiting_bert(rule)
    with pytest.raises(ValueError, match=message):
        set_exit_threshold(model, **settings)
    assert exit_rule_of(model).asked_layers() == []


@pytest.mark.parametrize("model", [tiny_bert(), pack(tiny_bert())])
def test_models_without_exits_have_no_threshold(model):
    with pytest.raises(ValueError, match="no exits by which examples leave"):
        exit_threshold(model)


@EACH_RULE
@pytest.mark.parametrize("target", [0.9, 0.83])
def test_the_slowest_threshold_below_the_target_is_chosen_and_set(batches, rule, target):
    model = exiting_bert(rule)
    chosen = choose_exit_threshold(model, batches, target_flops=target, min_share=0.0)
    below = [point for point in points_of(model, batches) if point.flops_ratio <= target]
    assert chosen == max(below, key=lambda point: point.flops_ratio)
    assert exit_threshold(model) == chosen.threshold
    score, flops_ratio, *_ = measured(model, batches, chosen.threshold)
    assert chosen.score == score
    assert chosen.flops_ratio == pytest.approx(flops_ratio) and flops_ratio <= target


def test_all_of_the_flops_are_spent_by_leaving_exits_off(batches):
    model = exiting_bert()
    chosen = choose_exit_threshold(model, batches, target_flops=1.0)
    assert (chosen.threshold, chosen.flops_ratio, chosen.exits) == (0.0, 1.0, ())
    set_exit_threshold(model, 0.3)
    assert exit_rule_of(model).asked_layers() == [0, 1, 2]


def test_a_target_out_of_reach_is_refused_with_what_can_be_reached(batches):
    model = exiting_bert()
    fastest = points_of(model, batches)[-1].flops_ratio
    with pytest.raises(ValueError, match=rf"target_flops=0.1 cannot be reached .* {fastest:.3f}"):
        choose_exit_threshold(model, batches, target_flops=0.1)
    assert exit_threshold(model) == 0.0


@EACH_RULE
@pytest.mark.parametrize("max_drop", [0.0, 0.1, 0.99])
def test_of_thresholds_within_the_loss_the_fastest_is_chosen(batches, rule, max_drop):
    model = exiting_bert(rule)
    points = points_of(model, batches)
    chosen = choose_exit_threshold(model, batches, max_drop=max_drop, min_share=0.0)
    within = [point for point in points if point.score >= points[0].score - max_drop - 1e-9]
    assert len(points) <= 200
    assert chosen.flops_ratio == min(point.flops_ratio for point in within)
    assert (
        measured(model, batches, exit_threshold(model))[0]
        == chosen.score
        >= points[0].score - max_drop - 1e-9
    )


def test_what_counts_as_score_can_be_told(batches):
    model = exiting_bert()
    seen = []

    def score(logits_BC, labels_B):
        seen.append((tuple(logits_BC.shape), tuple(labels_B.shape)))
        return 0.0

    chosen = choose_exit_threshold(model, batches, max_drop=0.0, score=score)
    assert chosen.mean_depth == 1.0
    assert set(seen) == {((45, 2), (45,))}


def test_exits_that_too_few_use_are_asked_no_more(batches):
    model = exiting_bert()
    for min_share, asked in ((0.0, (0, 1, 2)), (0.3, None)):
        chosen = choose_exit_threshold(model, batches, target_flops=0.75, min_share=min_share)
        assert exit_rule_of(model).asked_layers() == list(chosen.exits)
        assert chosen.flops_ratio <= 0.75
        assert chosen.exits == asked or all(chosen.leaves_L[layer] >= min_share for layer in chosen.exits)
        score, flops_ratio, depth, _ = measured(model, batches, chosen.threshold, asked=chosen.exits)
        assert (chosen.score, chosen.flops_ratio) == (score, pytest.approx(flops_ratio))
        assert chosen.mean_depth == pytest.approx(depth)
    assert len(chosen.exits) < 3


def test_a_goal_is_not_given_up_for_the_sake_of_fewer_exits(batches):
    model = exiting_bert()
    fastest = points_of(model, batches)[-1].flops_ratio
    chosen = choose_exit_threshold(model, batches, target_flops=fastest + 1e-6, min_share=0.9)
    assert 0 in chosen.exits and chosen.flops_ratio <= fastest + 1e-6


def test_patience_asks_every_exit_however_few_use_it(batches):
    model = exiting_bert("patience")
    chosen = choose_exit_threshold(model, batches, max_drop=0.99, min_share=0.9)
    assert chosen.exits == (0, 1, 2) and chosen.threshold == 1.0


def test_without_labels_only_a_score_cannot_be_asked_for(batches):
    bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    model = exiting_bert()
    assert choose_exit_threshold(model, bare, target_flops=0.8).score is None
    for goal in ({"max_drop": 0.1}, {"target_flops": 0.8, "score": lambda logits, labels: 0.0}):
        with pytest.raises(ValueError, match="no 'labels'"):
            choose_exit_threshold(model, bare, **goal)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "give exactly one"),
        ({"max_drop": 0.1, "target_flops": 0.5}, "give exactly one"),
        ({"max_drop": 1.0}, r"max_drop=1.0 is outside \[0, 1\)"),
        ({"target_flops": 0.0}, r"target_flops=0.0 is outside \(0, 1\]"),
        ({"max_drop": 0.1, "min_share": 1.0}, r"min_share=1.0 is outside \[0, 1\)"),
    ],
)
def test_goals_out_of_range_are_refused(batches, goal, message):
    with pytest.raises(ValueError, match=message):
        choose_exit_threshold(exiting_bert(), batches, **goal)


def test_a_sweep_is_in_the_order_given_and_leaves_the_threshold_as_it_was(batches):
    model = exiting_bert()
    set_exit_threshold(model, 0.25, exits=[1])
    points = sweep_exit_threshold(model, iter(batches), [0.69, 0.0, 0.5])
    assert [point.threshold for point in points] == [0.69, 0.0, 0.5]
    assert [point.exits for point in points] == [(1,), (), (1,)]
    assert points[1].mean_depth == LAYERS > points[2].mean_depth >= points[0].mean_depth
    assert exit_threshold(model) == 0.25
    with pytest.raises(ValueError, match="threshold=-1"):
        sweep_exit_threshold(model, batches, [-1.0])


def test_a_sweep_finds_thresholds_of_its_own_from_nobody_to_everybody(batches):
    model = exiting_bert("max_prob")
    points = sweep_exit_threshold(model, batches)
    assert len(points) == 20
    assert points[0].mean_depth == LAYERS and points[-1].mean_depth == 1.0
    assert [point.mean_depth for point in points] == sorted((p.mean_depth for p in points), reverse=True)
    patience = sweep_exit_threshold(exiting_bert("patience"), batches)
    assert [point.threshold for point in patience] == [math.inf, 2.0, 1.0]


def test_a_chosen_threshold_survives_in_the_state_and_in_low_precision(batches):
    model = exiting_bert("max_prob")
    model.exit_rule = exit_rule_of(model)
    chosen = choose_exit_threshold(model, batches, target_flops=0.8, min_share=0.1)
    again = exiting_bert("max_prob")
    again.exit_rule = exit_rule_of(again)
    again.load_state_dict(model.state_dict())
    assert exit_threshold(again.to(torch.bfloat16)) == chosen.threshold
    assert exit_rule_of(again).asked_layers() == list(chosen.exits)
    assert packed_encoder(again).exits.rule is again.exit_rule
