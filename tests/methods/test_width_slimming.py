"""WidthSlimming from prepare to restore: targets, schedule, criteria, composition, state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lightning_compress.compressor import Compressor
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.methods.distillation import DistillationConfig
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.methods.width_slimming import (
    WidthSlimmingConfig,
    convert,
    prepare,
    prune,
    restore,
    update,
)
from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.nn.importance import ImportanceMeter
from lightning_compress.nn.width_slimming import WidthGates
from lightning_compress.plan import PlanError
from tests.toys import tiny_bert
from tests.toys_slimming import batch, logits, slimmed

FAMILIES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
}


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("scope", ["linear", "encoder", "total"])
@pytest.mark.parametrize("target", [0.35, 0.6, 0.9])
def test_the_counted_model_meets_a_target_of_parameters(ranking: Any, scope: Any, target: float) -> None:
    dense = getattr(count_parameters(tiny_bert()), scope)
    handle = slimmed(4, ranking=ranking, scope=scope, target_params=target)
    convert(handle)
    left = getattr(count_parameters(handle.model), scope)
    assert target - 0.15 < left / dense <= target
    assert count_parameters(handle.model).total == sum(p.numel() for p in handle.model.parameters())


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("target", [0.3, 0.7])
def test_the_counted_model_meets_a_target_of_flops(ranking: Any, target: float) -> None:
    dense = sum(count_flops(tiny_bert(), [12]).layers)
    handle = slimmed(4, ranking=ranking, target_flops=target, text_length=12)
    convert(handle)
    assert target - 0.15 < sum(count_flops(handle.model, [12]).layers) / dense <= target


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 23])
@pytest.mark.parametrize("schedule", [None, 1, 5])
def test_the_schedule_ends_at_its_target_however_short_training_is(steps: int, schedule: int | None) -> None:
    handle = slimmed(steps, heads=1, ffn=17, embedding_rank=9, end=0.5, steps=schedule)
    structure = convert(handle)
    assert [len(ids) for ids in structure["heads"]] == [1, 1]
    assert structure["neurons"] == [17, 17] and structure["embedding_rank"] == 9


def test_steps_are_due_at_equal_distances() -> None:
    handle = prepare(tiny_bert(), WidthSlimmingConfig(heads=1, ffn=16, start=0.2, end=0.8))
    seen = []
    for percent in range(0, 100, 5):
        update(handle, percent / 100)
        seen.append((handle.done, handle.counts.heads_L[0], handle.counts.neurons_L[0], handle.phase))
    marks = [5 * seen.index(next(s for s in seen if s[0] == done)) for done in (1, 2, 3)]
    assert marks == [40, 60, 80]
    assert {s[:3] for s in seen} == {(0, 4, 64), (1, 3, 48), (2, 2, 32), (3, 1, 16)}
    assert [phase for phase, _ in itertools.groupby(s[3] for s in seen)] == ["warmup", "slimming", "recovery"]
    assert handle.is_on_target


def test_what_left_does_not_come_back() -> None:
    handle = prepare(tiny_bert(), WidthSlimmingConfig(heads=1, ffn=8, steps=6))
    kept = [set(range(64))]
    for step in range(1, 7):
        torch.manual_seed(step)
        for layer in handle.meter.layers:
            layer.neurons_F.copy_(torch.rand(64))
        handle.meter.num_passes = 1
        prune(handle, step)
        kept.append(set(handle.gates.neurons[0].kept))
    assert all(later < earlier for earlier, later in itertools.pairwise(kept))


def test_the_most_important_stay() -> None:
    model = tiny_bert()
    reference = ImportanceMeter(model)
    model(**batch()).loss.backward()
    reference.add()
    handle = slimmed(2, until=1, heads=2, ffn=20, start=0.0, end=0.5, steps=1)
    update(handle, 0.5)
    for gate, scores in zip(handle.gates.neurons, reference.layers, strict=True):
        best = scores.neurons_F.topk(20).indices.sort().values
        assert gate.kept == tuple(best.tolist())


def test_importance_before_the_start_is_forgotten_and_later_steps_count() -> None:
    handle = slimmed(20, until=6, start=0.2, end=0.9, heads=2)
    assert handle.phase == "slimming" and handle.done == 0
    assert handle.meter.num_passes == 2


@pytest.mark.parametrize(("model_type", "class_name"), FAMILIES.items())
def test_all_families_are_slimmed_and_rebuilt(model_type: str, class_name: str, tiny: Any) -> None:
    model, fresh = tiny(model_type, class_name), tiny(model_type, class_name)
    dense = count_parameters(model).encoder
    handle = slimmed(4, model=model, target_params=0.55)
    before = logits(model)
    structure = convert(handle)
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert count_parameters(model).encoder <= 0.55 * dense
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    restore(fresh, structure)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_embeddings_count_in_the_total_and_are_factored() -> None:
    handle = slimmed(4, scope="total", target_params=0.4)
    before = logits(handle.model)
    structure = convert(handle)
    assert structure["embedding_rank"] is not None
    assert torch.allclose(logits(handle.model), before, atol=1e-5)


def test_the_hidden_width_falls_with_the_rest() -> None:
    handle = slimmed(8, hidden=20, heads=2, ffn=0.5, embedding_rank=16)
    before = logits(handle.model)
    structure = convert(handle)
    assert structure["hidden"] == 20 and structure["embedding_rank"] == 16
    assert torch.allclose(logits(handle.model), before, atol=1e-5)
    fresh = tiny_bert(seed=9)
    restore(fresh, structure)
    fresh.load_state_dict(handle.model.state_dict())
    assert torch.equal(logits(fresh), logits(handle.model))


@pytest.mark.parametrize("scope", ["linear", "encoder", "total"])
def test_the_logged_cost_is_that_of_the_widths_of_the_moment(scope: Any) -> None:
    handle = prepare(tiny_bert(), WidthSlimmingConfig(hidden=20, heads=2, ffn=16, scope=scope, steps=3))
    dense = getattr(count_parameters(tiny_bert()), scope)
    seen = []
    for done in (0, 1, 2, 3):
        if done:
            prune(handle, done)
        seen.append(handle.counts.hidden)
        left = getattr(count_parameters(handle.model), scope)
        assert handle.metrics()["cost_ratio"] == pytest.approx(left / dense, rel=1e-9)
    assert seen == [32, 28, 24, 20] and handle.metrics()["cost_ratio"] < 0.75


def test_the_dense_skeleton_of_a_model_in_training_has_its_dense_size() -> None:
    compressor = Compressor(tiny_bert(), [WidthSlimmingConfig(scope="total", target_params=0.5)])
    compressor.prepare()
    compressor.update(0.99)
    assert count_parameters(compressor.model).total <= 0.5 * count_parameters(tiny_bert()).total
    assert count_parameters(compressor.dense_skeleton()) == count_parameters(tiny_bert())


COMPANY = {
    "ranks": [SoftThresholdRankConfig(target_params=0.8, rank_multiple=1)],
    "exits and hidden width": [MultiExitConfig(threshold=0.5)],
    "tokens": [ContributionTokenDroppingConfig(target_flops=0.5)],
    "ranks, exits, teacher and tokens": [
        SoftThresholdRankConfig(target_params=0.8, rank_multiple=1),
        MultiExitConfig(threshold=0.5),
        DistillationConfig(),
        BottleneckTokenDroppingConfig(target_flops=0.5),
    ],
}


@pytest.mark.parametrize("company", COMPANY)
def test_in_company_too_the_gated_model_is_counted_and_computes_as_the_cut_one(company: str) -> None:
    model, hidden = tiny_bert(), 24 if "hidden" in company else None
    config = WidthSlimmingConfig(scope="total", target_params=0.6, hidden=hidden)
    compressor = Compressor(model, [config, *COMPANY[company]])
    compressor.prepare()
    optimizer = torch.optim.AdamW(compressor.trainable_parameters(), lr=1e-3)
    model.train()
    for step in range(10):
        compressor.update(step / 10)
        compressor.begin_step()
        loss = compressor.task_weight * model(**batch()).loss + sum(compressor.take_loss_terms().values())
        loss.backward()
        compressor.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    gated, counted = logits(model), count_parameters(model)
    compressor.convert()
    assert torch.allclose(logits(model), gated, atol=1e-5)
    assert count_parameters(model) == counted
    assert counted.encoder < count_parameters(tiny_bert()).encoder


def test_a_model_converted_before_it_learned_keeps_its_largest_weights() -> None:
    model = tiny_bert()
    weight = model.bert.encoder.layer[0].attention.output.dense.weight
    largest = weight.detach().abs().sum(0).view(4, 8).sum(1).topk(2).indices.sort().values
    structure = convert(prepare(model, WidthSlimmingConfig(heads=2)))
    assert structure["heads"][0] == largest.tolist()


def test_learned_gates_reach_the_target_and_close_for_good() -> None:
    handle = slimmed(60, criterion="l0", target_params=0.5, start=0.1, end=0.7)
    assert handle.phase == "recovery" and handle.auxiliary_groups()[0].lr == 0.0
    assert handle.metrics()["cost_ratio"] <= 0.5
    before = logits(handle.model)
    dense = count_parameters(tiny_bert()).encoder
    convert(handle)
    assert torch.allclose(logits(handle.model), before, atol=1e-5)
    assert count_parameters(handle.model).encoder <= 0.5 * dense


def test_the_gates_that_are_most_likely_open_stay() -> None:
    handle = slimmed(10, until=4, criterion="l0", heads=2, ffn=3)
    torch.manual_seed(0)
    for location in handle.gates.locations:
        location.data.normal_()
    best = [
        location.topk(k).indices.sort().values.tolist()
        for k, location in zip((2, 2, 3, 3), handle.gates.locations, strict=True)
    ]
    update(handle, 0.8)
    assert [list(gate.kept) for gate in [*handle.gates.heads, *handle.gates.neurons]] == best


def test_nothing_is_left_in_a_model_that_is_refused() -> None:
    model = tiny_bert()
    with pytest.raises(ValueError, match="cannot be reached"):
        prepare(model, WidthSlimmingConfig(target_params=0.001))
    assert WidthGates.of(model) is None


@pytest.mark.parametrize("until", [1, 4, 6, 9])
@pytest.mark.parametrize(
    "settings", [{}, {"criterion": "l0"}, {"calibration_batches": 2}, {"scope": "total", "ranking": "global"}]
)
def test_the_state_survives_a_round_trip(until: int, settings: dict[str, Any]) -> None:
    first = slimmed(10, until=until, **settings)
    second = prepare(tiny_bert(seed=5), first.config)
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    mine, other = (
        {name: value for name, value in handle.metrics().items() if not name.startswith("calibration")}
        for handle in (first, second)
    )  # but for time
    assert mine == other and second.counts == first.counts
    assert torch.equal(logits(second.model), logits(first.model))
    for handle in (first, second):
        torch.manual_seed(0)
        update(handle, 0.95)
    assert second.gates.widths == first.gates.widths


def test_a_ledger_takes_gates_and_recorder_off_again() -> None:
    handle = slimmed(4, until=2, calibration_batches=2, ffn=0.5)
    handle.ledger.revert()
    assert WidthGates.of(handle.model) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in handle.model.modules())


def test_a_structure_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="do not fit"):
        restore(
            tiny_bert(), {"heads": [[9], None], "neurons": [3, None], "embedding_rank": None, "hidden": None}
        )
