"""What one pass foretells of every threshold, against passes from which examples really leave."""

import pytest
import torch

from lightning_compress.nn.flops import count_flops
from lightning_compress.nn.kept_flops import count_kept_flops
from lightning_compress.runtime import pack, packed_encoder
from lightning_compress.runtime.exit_trial import ExitTrial
from lightning_compress.runtime.trial import kept_counts
from tests.runtime.conftest import HalfPolicy
from tests.toys import tiny_bert
from tests.toys_exits import add_exits, labelled_batches, together

LAYERS = 4
EACH_RULE = pytest.mark.parametrize("rule", ["entropy", "max_prob", "margin", "patience", "learned"])
LENGTHS = [[9, 4, 12, 2, 7], [7, 1, 5, 11], [3, 3, 8, 6, 10, 4]]


def exiting_bert(rule="entropy", **settings):
    """A packed model whose random exits are as unsure of its answers as trained ones of hard texts."""
    model = pack(tiny_bert(num_hidden_layers=LAYERS, initializer_range=0.3, **settings)).eval()
    packed_encoder(model).exits = add_exits(model, rule)
    return model


@pytest.fixture
def batches():
    return labelled_batches(LENGTHS)


def measured(model, batches, threshold, asked=None):
    """Score, share of FLOPs, depths and shares of a pass from which examples leave."""
    encoder = packed_encoder(model)
    exits, rule = encoder.exits, encoder.exits.rule
    rule.threshold.fill_(threshold)
    if asked is not None:
        rule.is_checked_K.copy_(torch.tensor([layer in asked for layer in rule.layers]))
    right, depths, spent, dense = [], [], 0.0, 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits_BC, depth = together(model, exits, inputs)
        lengths_B = batch["attention_mask"].sum(dim=1)
        spent += count_kept_flops(model, kept_counts(encoder), lengths_B).sum().item()
        before = rule.threshold.clone()
        rule.threshold.fill_(rule.off)
        together(model, exits, inputs)
        dense += count_kept_flops(model, kept_counts(encoder), lengths_B).sum().item()
        rule.threshold.copy_(before)
        right += (logits_BC.argmax(-1) == batch["labels"]).tolist()
        depths += depth
    rule.threshold.fill_(rule.off)
    rule.is_checked_K.fill_(True)
    shares = [depths.count(layer + 1) / len(depths) for layer in range(LAYERS)]
    return sum(right) / len(right), spent / dense, sum(depths) / len(depths), shares


@EACH_RULE
@pytest.mark.parametrize("drops", [False, True])
def test_every_threshold_does_what_was_foretold(batches, rule, drops):
    model = exiting_bert(rule)
    if drops:
        packed_encoder(model).policy = HalfPolicy(layers=LAYERS)
    trial = ExitTrial(model, batches)
    thresholds = trial.thresholds(trial.layers)
    assert len(thresholds) == (LAYERS - 1 if rule == "patience" else 15 * (LAYERS - 1) + 1)
    for threshold in thresholds[:: max(1, len(thresholds) // 3)]:
        point = trial.at(threshold)
        score, flops_ratio, mean_depth, shares = measured(model, batches, threshold)
        assert point.score == score
        assert point.flops_ratio == pytest.approx(flops_ratio, rel=1e-12)
        assert point.mean_depth == pytest.approx(mean_depth)
        assert list(point.leaves_L) == pytest.approx(shares)


@EACH_RULE
def test_thresholds_go_from_nobody_to_everybody_and_depth_falls_all_the_way(batches, rule):
    trial = ExitTrial(exiting_bert(rule), batches)
    thresholds = trial.thresholds(trial.layers)
    points = [trial.at(threshold) for threshold in thresholds]
    depths = [point.mean_depth for point in points]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == LAYERS and points[0].flops_ratio == 1.0
    if rule != "patience":
        assert depths[-1] == 1.0
        assert thresholds[1:] == sorted(thresholds[1:], reverse=rule in ("max_prob", "margin"))


@EACH_RULE
def test_exits_that_are_not_asked_let_nobody_leave_and_cost_nothing(batches, rule):
    model = exiting_bert(rule)
    trial = ExitTrial(model, batches)
    thresholds = trial.thresholds([1])
    point = trial.at(thresholds[len(thresholds) // 2], [1])
    score, flops_ratio, mean_depth, shares = measured(model, batches, point.threshold, asked=[1])
    assert (point.score, point.mean_depth) == (score, pytest.approx(mean_depth))
    assert point.flops_ratio == pytest.approx(flops_ratio, rel=1e-12)
    assert list(point.leaves_L) == pytest.approx(shares)
    if rule == "patience":
        assert point.exits == (0, 1, 2)
    else:
        assert point.exits == (1,) and point.leaves_L[0] == point.leaves_L[2] == 0.0


def test_shares_score_and_costs_worked_by_hand(batches):
    model = exiting_bert()
    trial = ExitTrial(model, batches)
    trial.measure_BK = torch.tensor([[0.3, 0.1, 0.3], [0.1, 0.3, 0.3], [0.3, 0.3, 0.3], [0.1, 0.1, 0.1]])
    yes, no = [0.0, 1.0], [1.0, 0.0]
    trial.exit_logits_BKC = torch.tensor([[no, yes, no], [yes, no, no], [no, no, no], [yes, yes, yes]])
    trial.logits_BC, trial.labels_B = torch.tensor([no, no, yes, no]), torch.tensor([1, 1, 1, 0])
    trial.kept_BL, trial.lengths_B = torch.tensor([[5] * 4] * 4), torch.tensor([5] * 4)
    point = trial.at(0.2)
    assert point.leaves_L == (0.5, 0.25, 0.0, 0.25)
    assert point.mean_depth == (1 + 1 + 2 + 4) / 4
    assert point.score == 3 / 4
    layer, head, asked = 5 * 2 * (4 * 32 * 32 + 2 * 32 * 64) + 128 * 25, 2 * (32 * 32 + 32 * 2), 128
    spent = (1 + 1 + 2 + 4) * layer + 4 * head + (1 + 1 + 2 + 3) * asked
    assert point.flops_ratio == pytest.approx(spent / (16 * layer + 4 * head), rel=1e-12)
    assert point.flops == pytest.approx(spent / 4, rel=1e-12)
    assert trial.dense_flops(tiny_bert(num_hidden_layers=LAYERS)) == 4 * layer + head


def test_another_model_is_priced_with_every_token_in_every_layer(batches):
    model = exiting_bert()
    packed_encoder(model).policy = HalfPolicy(layers=LAYERS)
    trial, dense = ExitTrial(model, batches), tiny_bert(num_hidden_layers=LAYERS)
    lengths = [length for batch in LENGTHS for length in batch]
    expected = sum(count_flops(dense, [length]).total for length in lengths) / len(lengths)
    assert trial.dense_flops(dense) == pytest.approx(expected, rel=1e-12)
    assert trial.dense_flops(dense.to("meta")) == trial.dense_flops(exiting_bert())
    assert trial.dense_flops(dense) > trial.full_flops


@EACH_RULE
def test_the_curve_has_the_models_own_point_among_the_others(batches, rule):
    model = exiting_bert(rule)
    trial = ExitTrial(model, batches)
    assert trial.deployed() == trial.at(trial.rule.off)
    own = trial.thresholds(trial.layers)[-2]
    trial.rule.threshold.fill_(own)
    trial.rule.is_checked_K.copy_(torch.tensor([True, False, True]))
    asked = trial.rule.checked_layers()
    assert trial.deployed() == trial.at(own, asked)
    points = trial.curve(5)
    assert trial.deployed() in points and len(points) <= 6
    assert [point.mean_depth for point in points] == sorted((p.mean_depth for p in points), reverse=True)
    assert {point.threshold for point in points} == {float(own), *trial.thresholds(asked, 5)}
    assert len({point.threshold for point in points}) == len(points)


def test_a_trial_changes_nothing_about_the_model(batches):
    model = exiting_bert()
    encoder = packed_encoder(model)
    exits, before = encoder.exits, {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    ExitTrial(model, batches).at(0.3)
    assert model.training and encoder.exits is exits
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert exits.rule.threshold == 0.0


def test_a_failing_pass_puts_the_exits_back(batches):
    model = exiting_bert()
    exits = packed_encoder(model).exits
    with pytest.raises(ValueError, match="no 'labels'"):
        ExitTrial(model, [batches[0], {"input_ids": batches[1]["input_ids"]}])
    assert packed_encoder(model).exits is exits


def test_measures_that_are_no_numbers_offer_no_threshold(batches):
    trial = ExitTrial(exiting_bert(), batches)
    trial.measure_BK = torch.full_like(trial.measure_BK, torch.nan)
    assert trial.thresholds(trial.layers) == [0.0]
    assert trial.at(9.0).mean_depth == LAYERS


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda: tiny_bert(), "does not run packed: train it with MultiExit"),
        (lambda: pack(tiny_bert()), "runs packed but has no exits"),
    ],
)
def test_models_without_exits_are_refused(batches, prepare, message):
    with pytest.raises(ValueError, match=message):
        ExitTrial(prepare(), batches)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="there are no batches"):
        ExitTrial(exiting_bert(), [])


def test_without_labels_there_is_no_score_where_none_is_needed(batches):
    bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    model = exiting_bert()
    point, scored = (ExitTrial(model, given, needs_labels=False).at(0.5) for given in (bare, batches))
    assert point.score is None and scored.score is not None
    assert (point.flops_ratio, point.leaves_L) == (scored.flops_ratio, scored.leaves_L)
    assert ExitTrial(model, [*batches, bare[0]], needs_labels=False).at(0.5).score is None
