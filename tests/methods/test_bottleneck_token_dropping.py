"""BottleneckTokenDropping from settings to the deployed model, also of layers that were made slim."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, load, save_pretrained
from lightning_compress.methods import restore
from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_flops
from lightning_compress.nn.kept_flops import DroppingCosts
from lightning_compress.nn.tape import TokensKept
from lightning_compress.plan import CompressionPlan, MethodRecord, PlanError
from lightning_compress.runtime import packed_encoder
from lightning_compress.runtime.dial import set_threshold_scale
from tests.toys import tiny_bert
from tests.toys_contribution import FAMILIES, classifier
from tests.toys_training import training_steps

STEM = "bottleneck_token_dropping"


def texts(seed: int = 0, size: int = 8, width: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(1, width + 1, (size,), generator=generator)
    mask_BT = (torch.arange(width) < lengths_B[:, None]).long()
    ids_BT = torch.randint(3, 40, (size, width), generator=generator) * mask_BT
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": (ids_BT[:, 0] > 20).long()}


def prepared(model: nn.Module | None = None, **settings: Any) -> tuple[Compressor, Any]:
    compressor = Compressor(model or tiny_bert(), [BottleneckTokenDroppingConfig(**settings)])
    compressor.prepare()
    return compressor, compressor.handles[STEM]


def let_some_leave(handle: Any, width: float = 60.0) -> None:
    """Spread the log odds, and put the threshold among them."""
    with torch.no_grad():
        for sampler in handle.policy.samplers.values():
            sampler[4].weight *= width
        handle.policy.threshold.fill_(10.0)


def train(compressor: Compressor, steps: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    return [compressor.metrics() for _ in training_steps(compressor, texts, steps)]


def logits(model: Any, **inputs: Tensor) -> Tensor:
    inputs = inputs or texts()
    with torch.no_grad():
        return model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def kept(model: nn.Module) -> list[int]:
    return [segments.num_rows for segments in packed_encoder(model).latest]


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_flops": 0.5, "target_tokens": 0.5}, "are two goals: give one"),
        ({"target_flops": 0.0}, r"target_flops=0.0 is outside \(0, 1\]"),
        ({"target_tokens": 1.2}, r"target_tokens=1.2 is outside \(0, 1\]"),
        ({"removal_weight": -1.0}, "removal_weight=-1.0 is negative"),
        ({"entropy_weight": -1.0}, "entropy_weight=-1.0 is negative"),
        ({"objective": "length"}, r"objective='length' is not one of \['bottleneck', 'skim'\]"),
        ({"form": "l1"}, "form='l1' is not one of"),
        ({"penalize": "logits"}, "penalize='logits' is not one of"),
        ({"removal_weight": float("inf")}, "removal_weight=inf is not finite"),
        ({"sampler_lr": float("inf")}, "sampler_lr=inf is not positive and finite"),
        ({"protect_tokens": (None,)}, r"protect_tokens=\(None,\) are no token ids"),
        ({"protect_tokens": (-1,)}, r"protect_tokens=\(-1,\) are no token ids"),
        ({"sampler_width": 0}, "sampler_width=0 is below 1"),
        ({"sampler_lr": 0.0}, "sampler_lr=0.0 is not positive"),
        ({"protect_first": 0}, "protect_first=0 is below 1"),
        ({"max_drop": 1.0}, r"max_drop=1.0 is outside \[0, 1\)"),
        ({"warmup": 1.0}, r"warmup=1.0 is outside \[0, 1\)"),
        ({"warmup": 0.5, "ramp_end": 0.5}, r"ramp_end=0.5 is outside \(warmup=0.5, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckTokenDroppingConfig(**settings)


def test_half_of_the_flops_is_the_target_unless_a_goal_or_a_weight_is_given() -> None:
    config = BottleneckTokenDroppingConfig
    assert config().target == 0.5 and config(target_tokens=0.3).target == 0.3
    assert config(removal_weight=0.1).target is None
    assert config(removal_weight=0.0, target_flops=0.4).target == 0.4


# preparing


def test_evaluation_is_that_of_the_dense_model_after_preparing_with_every_setting() -> None:
    dense = logits(tiny_bert())
    for settings in ({}, {"layers": [1]}, {"sampler_width": 3}, {"target_tokens": 0.1, "warmup": 0.0}):
        compressor, _ = prepared(**settings)
        assert torch.allclose(logits(compressor.model), dense, atol=1e-5)


def test_evaluation_is_deterministic_and_training_is_drawn() -> None:
    compressor, handle = prepared()
    let_some_leave(handle, width=5.0)
    first = logits(compressor.model)
    assert all(torch.equal(logits(compressor.model), first) for _ in range(3))
    compressor.model.train()
    drawn = [compressor.model(**texts()).logits for _ in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_the_two_policies_are_refused_in_one_run() -> None:
    configs = [BottleneckTokenDroppingConfig(), ContributionTokenDroppingConfig()]
    with pytest.raises(ValueError, match=r"both decide which tokens.*keep one of the two callbacks"):
        Compressor(tiny_bert(), configs).prepare()


def test_samplers_have_the_private_optimizer_and_rest_at_the_end() -> None:
    compressor, handle = prepared(sampler_lr=0.01, layers=[0], sampler_width=3)
    assert sum(p.numel() for p in compressor.auxiliary_parameters()) == 2 * 32 + 33 * 3 + 2 * 3 + 4 * 2
    rates = []
    for progress in (0.0, 0.5, 1.0):
        compressor.update(progress)
        rates.append(handle.auxiliary_groups()[0].lr)
    assert rates == pytest.approx([0.01, 0.005, 0.0])


# training


def test_the_noise_fades_in_the_last_fifth_of_the_search_and_recovery_has_none() -> None:
    compressor, handle = prepared(warmup=0.2, ramp_end=0.7)
    seen = []
    for progress in (0.0, 0.2, 0.6, 0.65, 0.7, 1.0):
        compressor.update(progress)
        seen.append((handle.phase, round(handle.policy.noise, 6)))
    assert seen == [
        ("warmup", 1.0), ("search", 1.0), ("search", 1.0), ("search", 0.5), ("recovery", 0.0), ("recovery", 0.0)
    ]  # fmt: skip


def test_terms_are_of_the_latest_pass_if_only_the_base_model_is_called() -> None:
    compressor, handle = prepared(warmup=0.0)
    compressor.update(0.1)
    compressor.model.train()
    for seed in (1, 2):
        compressor.begin_step()
        inputs = {name: values for name, values in texts(seed, size=seed).items() if name != "labels"}
        compressor.model.bert(**inputs)  # type: ignore[operator]
        sum(compressor.take_loss_terms().values()).backward()  # type: ignore[union-attr]
    compressor.begin_step()
    assert handle.goal.latest[3] == 2 * float(inputs["attention_mask"].sum())


def test_recovery_stays_what_it_is_where_a_longer_run_resumes() -> None:
    compressor, handle = prepared(target_tokens=0.5, warmup=0.0, ramp_end=0.7)
    train(compressor, 20)
    assert handle.phase == "recovery"
    compressor.update(0.1)
    assert handle.phase == "recovery" and handle.policy.noise == 0.0
    handle.policy.noise = 1.0
    compressor.load_state_dict(compressor.state_dict())
    assert handle.policy.noise == 0.0
    handle.goal.totals = handle.goal.latest = [0.6, 1.0, 0.6, 1.0, 0.1, 0.6, 1.0]  # 0.6 of the tokens
    before = float(handle.policy.threshold)
    compressor.update(0.2)  # where the search would ask for more than 0.75 of the tokens
    assert float(handle.policy.threshold) > before


@pytest.mark.parametrize("objective", ["bottleneck", "skim"])
def test_training_follows_the_scheduled_target_and_ends_on_it(objective: Any) -> None:
    compressor, handle = prepared(target_tokens=0.6, warmup=0.0, objective=objective)
    seen = [step[f"compress/{STEM}/tokens_kept"] for step in train(compressor, 80)]
    assert seen[0] > 0.99 and 0.5 < seen[55] < 0.72
    assert handle.phase == "recovery"
    assert float(handle.policy.threshold) > 2.0


def test_the_price_rises_while_the_threshold_has_to_once_tokens_react() -> None:
    compressor, handle = prepared(target_tokens=0.4, warmup=0.0)
    seen = train(compressor, 60)
    prices = [step[f"compress/{STEM}/multiplier"] for step in seen]
    thresholds = [step[f"compress/{STEM}/threshold"] for step in seen]
    assert prices[1] == 1.0 < max(prices) and thresholds[1] > 0.0
    moves = [(after - before, later / now) for before, after, now, later in zip(
        thresholds, thresholds[1:], prices, prices[1:], strict=False
    ) if 1.0 < now < 1000.0 and 1.0 < later < 1000.0]  # fmt: skip
    assert any(abs(move) > 0.01 for move, _ in moves)
    assert all(
        factor == pytest.approx(math.exp(2 * move), rel=1e-3) or factor == 1.0 for move, factor in moves
    )
    assert handle.state_dict()["multiplier"] == prices[-1]


def test_without_a_target_the_weight_alone_drops() -> None:
    compressor, handle = prepared(removal_weight=20.0, warmup=0.0, sampler_lr=0.05)
    seen = train(compressor, 20)
    assert seen[-1][f"compress/{STEM}/ratio"] < 0.8 and handle.is_on_target
    assert float(handle.policy.threshold) == 0.0


def test_a_step_that_is_done_again_moves_nothing() -> None:
    compressor, handle = prepared(target_tokens=0.5, warmup=0.0)
    train(compressor, 3)
    compressor.update(0.9)
    threshold = float(handle.policy.threshold)
    compressor.update(0.9)
    assert float(handle.policy.threshold) == threshold > 0.0


# deployment


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_deployed_as_it_was_evaluated_in_batches_and_alone(family: str) -> None:
    compressor, handle = prepared(classifier(family, initializer_range=0.02), protect_tokens=[7])
    let_some_leave(handle)
    before = logits(compressor.model)
    compressor.convert()
    assert torch.allclose(logits(compressor.model), before, atol=1e-5)
    assert texts()["attention_mask"].sum() > kept(compressor.model)[0] > kept(compressor.model)[1] >= 8
    for row in range(8):
        length = int(texts()["attention_mask"][row].sum())
        alone = {name: value[row : row + 1, :length] for name, value in texts().items() if name != "labels"}
        assert torch.allclose(logits(compressor.model, **alone), before[row], atol=1e-5)


def test_restoring_gives_the_same_model_and_the_dial_starts_as_trained() -> None:
    compressor, handle = prepared(layers=[1], sampler_width=6, protect_first=2)
    let_some_leave(handle)
    plan = CompressionPlan.from_dict(compressor.convert().to_dict())
    assert plan.methods[0].structure == {
        "layers": [1], "sampler_width": 6, "protect_first": 2, "protect_tokens": []
    }  # fmt: skip
    fresh = tiny_bert(seed=5)
    restore(fresh, plan)
    fresh.load_state_dict(compressor.model.state_dict())
    assert torch.equal(logits(fresh), logits(compressor.model))
    trained = kept(fresh)
    set_threshold_scale(fresh, 1.0)
    assert logits(fresh) is not None and kept(fresh) == trained
    set_threshold_scale(fresh, 0.0)
    assert logits(fresh) is not None and kept(fresh) == [int(texts()["attention_mask"].sum())] * 2


@pytest.mark.parametrize(
    "change",
    [{"sampler_width": 0}, {"sampler_width": "wide"}, {"layers": [2]}, {"layers": 1}, {"protect_first": 0}],
)
def test_a_plan_that_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    structure = {"layers": [1], "sampler_width": 6, "protect_first": 1, "protect_tokens": [], **change}
    plan = CompressionPlan("bert", (MethodRecord(STEM, "converted", {}, structure),))
    with pytest.raises(PlanError, match="the plan of dropped tokens does not fit"):
        restore(tiny_bert(), plan)


def slim_bert() -> Any:
    """A BERT whose layers were sliced by hand: other heads and neurons in each."""
    model = tiny_bert()
    for layer, heads, neurons in ((0, [0, 2, 3], 40), (1, [1], 12)):
        block = model.bert.encoder.layer[layer]
        rows = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in heads])
        attention, cut = block.attention.self, block.attention.output
        for name in ("query", "key", "value"):
            setattr(attention, name, sliced(getattr(attention, name), rows=rows))
        cut.dense = sliced(cut.dense, columns=rows)
        attention.num_attention_heads, attention.all_head_size = len(heads), len(rows)
        block.intermediate.dense = sliced(block.intermediate.dense, rows=torch.arange(neurons))
        block.output.dense = sliced(block.output.dense, columns=torch.arange(neurons))
    return model


def sliced(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    weight, bias = linear.weight.data, linear.bias.data
    weight, bias = (weight, bias) if rows is None else (weight[rows], bias[rows])
    weight = weight if columns is None else weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0])
    new.weight.data, new.bias.data = weight.clone(), bias.clone()
    return new


def test_slim_layers_lose_tokens_too_and_run_packed_as_they_were_trained() -> None:
    model = slim_bert()
    layers = describe(model).layers
    assert [(layer.num_heads, layer.intermediate_size) for layer in layers] == [(3, 40), (1, 12)]
    dense = logits(model)
    compressor, handle = prepared(model, target_tokens=0.6, warmup=0.0, sampler_width=4)
    assert torch.allclose(logits(model), dense, atol=1e-5)
    train(compressor, 10)
    let_some_leave(handle)
    before = logits(model)
    compressor.convert()
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert kept(model)[1] < kept(model)[0] < int(texts()["attention_mask"].sum())


def test_costs_are_those_of_slim_layers_and_a_wide_sampler_eats_what_they_save() -> None:
    def shares(model: Any, width: int | None) -> list[float]:
        compressor, _ = prepared(model, sampler_width=width)
        costs = DroppingCosts.of(compressor.model)
        return [scored / layer for scored, layer in zip(costs.scored, costs.kept, strict=True)]

    assert shares(tiny_bert(), None)[0] == pytest.approx(
        2 * (32 * 32 + 64) / (2 * (4 * 32 * 32 + 2 * 32 * 64))
    )
    wide, narrow = shares(slim_bert(), None), shares(slim_bert(), 4)
    assert wide[1] > 4 * shares(tiny_bert(), None)[1] and narrow[1] < wide[1] / 7
    slim, fat = (count_flops(model, [9]).total for model in (slim_bert(), tiny_bert()))
    assert slim < fat


def test_tokens_leave_layers_of_low_rank() -> None:
    configs = [SoftThresholdRankConfig(target_params=0.5, rank_multiple=4), BottleneckTokenDroppingConfig()]
    compressor = Compressor(tiny_bert(), configs)
    compressor.prepare()
    train(compressor, 10)
    let_some_leave(compressor.handles[STEM])
    before = logits(compressor.model)
    assert [record.method for record in compressor.convert().methods] == ["soft_threshold_rank", STEM]
    assert torch.allclose(logits(compressor.model), before, atol=1e-4)
    assert kept(compressor.model)[1] < int(texts()["attention_mask"].sum())


def test_bf16_models_are_prepared_trained_and_deployed() -> None:
    compressor, handle = prepared(tiny_bert().bfloat16(), target_tokens=0.5, warmup=0.0)
    assert {p.dtype for p in handle.policy.parameters()} == {torch.bfloat16}
    assert handle.policy.threshold.dtype == torch.float32
    train(compressor, 4)
    let_some_leave(handle)
    before = logits(compressor.model)
    compressor.convert()
    assert torch.allclose(logits(compressor.model).float(), before.float(), atol=0.05)
    policy = packed_encoder(compressor.model).policy
    assert {tensor.dtype for tensor in policy.state_dict().values()} == {torch.bfloat16}


def test_in_bf16_corrections_too_small_for_bf16_add_up() -> None:
    compressor, handle = prepared(target_tokens=0.5, warmup=0.0)
    compressor.model.bfloat16()
    handle.policy.threshold.fill_(12.0)
    handle.goal.latest = handle.goal.totals = [0.5005, 1.0, 0.5005, 1.0, 0.1, 1.0, 1.0]
    for number in range(51):
        compressor.update(0.7 + 0.001 * number)  # 0.2 of a Newton step of 0.001 / 0.1
    assert float(handle.policy.threshold) == pytest.approx(12.0 + 51 * 0.002, abs=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bf16_model_evaluates_as_it_is_deployed_and_loaded(when: str, tmp_path: Path) -> None:
    model = tiny_bert()
    compressor, handle = prepared(model.bfloat16() if when == "before" else model)
    model.bfloat16()
    with torch.no_grad():
        for sampler in handle.policy.samplers.values():
            sampler[4].weight.zero_()
            sampler[4].bias.copy_(torch.tensor([-6.1875, 6.1875]))
    handle.policy.threshold.fill_(12.376)  # tokens have 12.375, the nearest number in bf16
    logits(model)
    tokens = [int(record.keep_BT.sum()) for record in handle.tape.read(TokensKept)]
    attach_plan(model, compressor.convert())
    packed = logits(model)
    assert tokens == kept(model) == [int(texts()["attention_mask"].sum())] * 2
    save_pretrained(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(logits(loaded), packed) and kept(loaded) == tokens
