"""Shape legend: B sequences, L layers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_compress.deploy import load, save_pretrained
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.nn.kept_flops import count_kept_flops
from lightning_compress.runtime import pack, packed_encoder
from lightning_compress.runtime.dial import (
    choose_threshold_scale,
    set_threshold_scale,
    sweep_threshold_scale,
    threshold_scale,
)
from tests.toys import tiny_bert
from tests.toys_dropping import dropping_bert, ragged_batch

LENGTHS = [[9, 4, 12], [7, 1]]


@pytest.fixture
def model():
    return dropping_bert()


@pytest.fixture
def batches():
    return [ragged_batch(lengths, seed=index) for index, lengths in enumerate(LENGTHS)]


def labelled_by(model, batches, scale):
    """The batches with the model's own answers at a scale as labels."""
    set_threshold_scale(model, scale)
    with torch.no_grad():
        answers = [model(b["input_ids"], b["attention_mask"]).logits.argmax(-1) for b in batches]
    set_threshold_scale(model, 1.0)
    return [{**batch, "labels": answer} for batch, answer in zip(batches, answers, strict=True)]


def test_the_scale_multiplies_the_thresholds(model, batches):
    batch, encoder = batches[0], packed_encoder(model)
    eta_K = encoder.policy.eta_K.clone()
    set_threshold_scale(model, 1.7)
    scaled = model(batch["input_ids"], batch["attention_mask"]).logits
    kept = [segments.origin_N.tolist() for segments in encoder.latest]
    set_threshold_scale(model, 1.0)
    encoder.policy.eta_K.copy_(1.7 * eta_K)
    by_hand = model(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(scaled, by_hand)
    assert kept == [segments.origin_N.tolist() for segments in encoder.latest]
    assert len(kept[0]) < batch["attention_mask"].sum()


def test_scale_zero_drops_nothing_and_a_large_one_all_but_the_first(model, batches):
    nothing, everything = sweep_threshold_scale(model, batches, [0.0, 1e6])
    assert nothing.tokens_kept_L == (1.0, 1.0)
    assert everything.tokens_kept_L == pytest.approx((5 / 33, 5 / 33))


def test_a_sweep_reports_totals_over_unpadded_tokens(model, batches):
    (point,) = sweep_threshold_scale(model, batches, [1.0])
    encoder, kept, lengths = packed_encoder(model), [], torch.tensor([9, 4, 12, 7, 1])
    for batch in batches:
        model(batch["input_ids"], batch["attention_mask"])
        kept.append(torch.stack([segments.lengths_B for segments in encoder.latest], 1))
    kept_BL = torch.cat(kept)
    spent = count_kept_flops(model, kept_BL, lengths).sum()
    dense = count_kept_flops(tiny_bert(), lengths[:, None].expand(5, 2), lengths).sum()
    assert point.flops_ratio == pytest.approx(float(spent / dense))
    assert point.tokens_kept_L == pytest.approx((kept_BL.sum(0) / 33).tolist())
    assert 0 < point.flops_ratio < 1


def test_a_sweep_leaves_dial_and_mode_as_they_were(model, batches):
    set_threshold_scale(model, 0.5)
    model.train()
    sweep_threshold_scale(model, batches, [3.0])
    assert threshold_scale(model) == 0.5
    assert model.training


def test_the_score_is_the_accuracy_over_all_examples(model, batches):
    labelled = labelled_by(model, batches, 1.0)
    labelled[1]["labels"] = 1 - labelled[1]["labels"]
    (point,) = sweep_threshold_scale(model, labelled, [1.0])
    assert point.score == pytest.approx(3 / 5)


def test_the_score_of_a_regression_is_the_correlation(batches):
    model = dropping_bert(num_labels=1)
    outputs = [model(b["input_ids"], b["attention_mask"]).logits.flatten() for b in batches]
    labelled = [
        {**b, "labels": 3 - 2 * o.detach() + torch.arange(len(o)) / 50}
        for b, o in zip(batches, outputs, strict=True)
    ]
    (point,) = sweep_threshold_scale(model, labelled, [1.0])
    pairs = torch.stack([torch.cat(outputs).detach(), torch.cat([b["labels"] for b in labelled])])
    assert point.score == pytest.approx(float(torch.corrcoef(pairs)[0, 1]), abs=1e-5)


def test_the_score_can_be_anything(model, batches):
    def mean_of_labels(logits, labels):
        return labels.double().mean()

    (point,) = sweep_threshold_scale(model, batches, [1.0], score=mean_of_labels)
    assert point.score == pytest.approx(torch.cat([b["labels"] for b in batches]).double().mean().item())


def test_entries_the_model_does_not_take_are_left_out(model, batches):
    named = [{**batch, "name": ["x"] * len(batch["labels"])} for batch in batches]
    assert sweep_threshold_scale(model, named, [1.0]) == sweep_threshold_scale(model, batches, [1.0])


def test_without_a_mask_every_token_counts(model):
    batch = {"input_ids": torch.full((2, 6), 7), "labels": torch.zeros(2, dtype=torch.long)}
    (point,) = sweep_threshold_scale(model, [batch], [1e6])
    assert point.tokens_kept_L == pytest.approx((1 / 6, 1 / 6))


def test_target_flops_is_met_from_below_and_set(model, batches):
    slow, *_, fast = sweep_threshold_scale(model, batches, [0.0, 1e5])
    target = (slow.flops_ratio + fast.flops_ratio) / 2
    point = choose_threshold_scale(model, batches, target_flops=target)
    assert fast.flops_ratio < point.flops_ratio <= target
    assert threshold_scale(model) == pytest.approx(point.scale)
    assert sweep_threshold_scale(model, batches, [point.scale]) == [point]


def without_labels(batches):
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


@pytest.mark.parametrize("num_labels", [1, 2])
def test_target_flops_needs_no_labels_and_then_there_is_no_score(batches, num_labels):
    model = dropping_bert(num_labels=num_labels)
    scored = choose_threshold_scale(model, batches, target_flops=0.6)
    for unlabelled in (without_labels(batches), [batches[0], *without_labels(batches[1:])]):
        set_threshold_scale(model, 1.0)
        point = choose_threshold_scale(model, unlabelled, target_flops=0.6)
        assert point == replace(scored, score=None) and isinstance(scored.score, float)
        assert threshold_scale(model) == pytest.approx(point.scale)


def test_what_is_scored_needs_labels(model, batches):
    unlabelled = without_labels(batches)
    with pytest.raises(ValueError, match="but no 'labels'"):
        choose_threshold_scale(model, unlabelled, max_drop=0.1)
    with pytest.raises(ValueError, match="but no 'labels'"):
        choose_threshold_scale(model, unlabelled, target_flops=0.6, score=lambda logits, labels: 0.0)
    with pytest.raises(ValueError, match="but no 'labels'"):
        sweep_threshold_scale(model, unlabelled, [1.0])
    with pytest.raises(ValueError, match=r"a batch is a list: give dicts of the model's keyword arguments$"):
        choose_threshold_scale(model, [[1]], target_flops=0.6)
    assert threshold_scale(model) == 1.0


def test_the_whole_of_the_flops_needs_no_dropping_where_predictors_cost_nothing(model, batches, monkeypatch):
    monkeypatch.setattr(type(packed_encoder(model).policy), "flops_per_token_of", lambda self, layer: 0)
    assert choose_threshold_scale(model, batches, target_flops=1.0).scale == 0.0


def test_other_policies_are_dialled_in_the_same_way(batches):
    model = dropping_bert(method=BottleneckTokenDroppingConfig)
    slow, *_, fast = sweep_threshold_scale(model, batches, [0.0, 2.0**18])
    assert slow.tokens_kept_L == (1.0, 1.0)
    target = (slow.flops_ratio + fast.flops_ratio) / 2
    assert (
        fast.flops_ratio < choose_threshold_scale(model, batches, target_flops=target).flops_ratio <= target
    )


def test_a_target_out_of_reach_names_the_range_and_changes_nothing(model, batches):
    with pytest.raises(ValueError, match=r"target_flops=0.001 cannot be reached .* they reach 0\.\d+ to 1\."):
        choose_threshold_scale(model, batches, target_flops=0.001)
    assert threshold_scale(model) == 1.0


def test_max_drop_takes_the_fastest_scale_that_is_good_enough(model, batches):
    def penalised(logits, labels):  # falls by 0.1 for each doubling of the scale beyond a half
        return -0.1 * max(0.0, 1.0 + float(packed_encoder(model).policy.scale.clamp(min=1e-3).log2()))

    point = choose_threshold_scale(model, batches, max_drop=0.25, score=penalised)
    grid = sweep_threshold_scale(model, batches, [2.0**e for e in (-1, 0, 1, 1.25, 1.5)], score=penalised)
    assert point.score >= -0.25
    assert point.flops_ratio <= min(p.flops_ratio for p in grid)
    assert threshold_scale(model) == pytest.approx(point.scale)


def test_max_drop_is_measured_against_dropping_nothing(model, batches):
    labelled = labelled_by(model, batches, 0.0)
    point = choose_threshold_scale(model, labelled, max_drop=0.0)
    assert point.score == 1.0
    faster = sweep_threshold_scale(model, labelled, [point.scale * 2**0.5, point.scale * 2])
    assert all(p.score < 1.0 or p.flops_ratio >= point.flops_ratio for p in faster)


def test_the_dial_is_saved_with_the_weights(model, tmp_path):
    set_threshold_scale(model, 1.5)
    save_pretrained(model, tmp_path / "model")
    assert threshold_scale(load(tmp_path / "model")) == 1.5


def test_a_module_that_holds_the_model_will_do(model, batches):
    holder = nn.ModuleDict({"inner": model})
    set_threshold_scale(holder, 2.0)
    assert threshold_scale(model) == 2.0
    assert sweep_threshold_scale(holder, batches, [1.0]) == sweep_threshold_scale(model, batches, [1.0])


@pytest.mark.parametrize("scale", [-0.1, float("inf"), float("nan")])
def test_a_scale_out_of_range_is_refused(model, batches, scale):
    with pytest.raises(ValueError, match="finite and at least 0"):
        set_threshold_scale(model, scale)
    with pytest.raises(ValueError, match="finite and at least 0"):
        sweep_threshold_scale(model, batches, [1.0, scale])


@pytest.mark.parametrize("goals", [{}, {"max_drop": 0.1, "target_flops": 0.5}])
def test_exactly_one_goal_is_wanted(model, batches, goals):
    with pytest.raises(ValueError, match="exactly one"):
        choose_threshold_scale(model, batches, **goals)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({"max_drop": -0.1}, r"max_drop=-0.1 is outside \[0, 1\)"),
        ({"max_drop": 1.0}, r"max_drop=1.0 is outside"),
        ({"target_flops": 0.0}, r"target_flops=0.0 is outside \(0, 1\]"),
        ({"target_flops": 1.1}, r"target_flops=1.1 is outside"),
    ],
)
def test_a_goal_out_of_range_is_refused(model, batches, goal, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold_scale(model, batches, **goal)


def test_models_without_a_dial_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="does not run packed: train it with"):
        threshold_scale(tiny_bert())
    with pytest.raises(ValueError, match="has no policy that drops tokens"):
        set_threshold_scale(pack(tiny_bert()), 1.0)
