"""ContributionTokenDropping as four verbs: what evaluation sees is what the packed engine keeps, in every family."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, load, save_pretrained
from lightning_compress.methods.contribution_token_dropping import (
    ContributionTokenDroppingConfig,
    convert,
    prepare,
    restore,
    update,
)
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.contribution_token_dropping import ExpectedTokens
from lightning_compress.nn.flops import count_flops
from lightning_compress.nn.kept_flops import DroppingCosts
from lightning_compress.plan import CompressionPlan, MethodRecord, PlanError
from lightning_compress.runtime import is_packed, packed_encoder
from tests.toys import tiny_bert
from tests.toys_contribution import (
    FAMILIES,
    SEPARATOR,
    classifier,
    dropping,
    hard_pass,
    packed_pass,
    step,
    texts,
)
from tests.toys_training import training_steps

STEM = "contribution_token_dropping"
PROTECTIONS = {
    "only the first": {},
    "separators": {"protect_tokens": (SEPARATOR,)},
    "two": {"protect_first": 2},
}


@pytest.mark.parametrize("protection", PROTECTIONS.values(), ids=PROTECTIONS)
@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pairs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_while_training_and_the_packed_engine_keep_the_same_tokens_and_give_the_same_logits(
    family: str, pairs: bool, protection: dict[str, Any]
) -> None:
    inputs = texts(family, pairs)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        handle = dropping(classifier(family).to(dtype), **protection)
        logits, kept = hard_pass(handle, inputs)
        counts = [record.count_B.sum().item() for record in handle.tape.read(ExpectedTokens)]
        convert(handle)
        packed, packed_kept = packed_pass(handle.model, inputs)
        assert kept == packed_kept and counts == [len(places) for places in kept]
        assert torch.allclose(packed, logits, atol=tolerance, rtol=0)
        real = int(inputs["attention_mask"].sum())
        assert len(inputs["attention_mask"]) <= counts[-1] < counts[0] < real
        firsts, width = {row * 9 for row in range(4)}, 9
        protected = inputs["attention_mask"].bool() & (inputs["input_ids"] == SEPARATOR)
        if "protect_tokens" in protection:
            firsts |= set(protected.flatten().nonzero().flatten().tolist())
        if "protect_first" in protection:
            firsts |= {row * width + 1 for row in (0, 1, 3)}
        assert all(firsts <= set(places) for places in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_decides_as_its_texts_alone_in_any_order_and_with_any_padding(family: str) -> None:
    handle = dropping(classifier(family).double())
    convert(handle)
    model, inputs = handle.model, texts(family)
    together, _ = packed_pass(model, inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone, _ = packed_pass(model, {n: v[row : row + 1, :length] for n, v in inputs.items()})
        assert torch.allclose(alone[0], together[row], atol=1e-10, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    shuffled, _ = packed_pass(model, {name: value[order] for name, value in inputs.items()})
    assert torch.allclose(shuffled, together[order], atol=1e-10, rtol=0)
    padded = {n: nn.functional.pad(v, (0, 4), value=int(n == "input_ids")) for n, v in inputs.items()}
    assert torch.allclose(packed_pass(model, padded)[0], together, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pad_left", [False, True])
def test_a_text_that_keeps_its_first_token_only_still_has_a_prediction(pad_left: bool) -> None:
    handle = dropping(classifier().double(), eta=1.0)
    with torch.no_grad():
        handle.policy.scale.fill_(4.0)
        for predictor in handle.policy.predictors.values():
            predictor[2].weight.zero_()
    inputs = texts()
    if pad_left:
        inputs = {name: value.flip(1) for name, value in inputs.items()}
    logits, kept = hard_pass(handle, inputs)
    assert all(len(places) == 4 for places in kept) and logits.isfinite().all()
    convert(handle)
    packed, packed_kept = packed_pass(handle.model, inputs)
    assert packed_kept == kept
    if not pad_left:  # classifiers read the first place
        assert torch.allclose(packed, logits, atol=1e-10, rtol=0)


def test_texts_of_one_token_and_a_batch_of_one_work() -> None:
    handle = dropping(classifier())
    inputs = texts(lengths=(1, 1))
    logits, _ = hard_pass(handle, inputs)
    convert(handle)
    assert torch.allclose(packed_pass(handle.model, inputs)[0], logits, atol=1e-5)
    assert packed_pass(handle.model, texts(lengths=(1,)))[0].shape == (1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_has_no_nan(dtype: torch.dtype) -> None:
    handle = dropping(classifier(initializer_range=0.05))
    convert(handle)
    exact, kept = packed_pass(handle.model, texts())
    rounded, rounded_kept = packed_pass(handle.model.to(dtype), texts())
    assert rounded.dtype == dtype and torch.allclose(rounded.float(), exact, atol=0.1)
    assert abs(len(rounded_kept[-1]) - len(kept[-1])) <= 3


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.99])
def test_training_under_autocast_has_finite_gradients(precision: torch.dtype, progress: float) -> None:
    handle = dropping(classifier(), saliency_to_encoder=True)
    update(handle, progress)
    with torch.autocast("cpu", precision):
        step(handle, texts(), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad.isfinite().all() for p in handle.model.parameters() if p.grad is not None)


def test_regression_trains_and_predicts() -> None:
    handle = dropping(classifier(num_labels=1), saliency_weight=1.0)
    labels, losses = torch.tensor([0.5, -1.0, 0.0, 2.0]), []
    optimizer = torch.optim.Adam(handle.model.parameters(), lr=1e-3)
    for progress in (0.0, 0.01, 0.02, 0.03, 0.04, 0.05):
        update(handle, progress)
        losses.append(step(handle, texts(), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    before, _ = hard_pass(handle, texts())
    convert(handle)
    assert torch.allclose(packed_pass(handle.model, texts())[0], before, atol=1e-4)


def test_the_phases_follow_the_schedule_and_the_teacher_is_the_model_at_the_end_of_the_warm_up() -> None:
    config = ContributionTokenDroppingConfig(warmup=0.25, ramp_end=0.75, slope_start=10.0, slope_end=1e5)
    handle = prepare(tiny_bert(), config)
    phases, slopes = [], []
    for number in range(20):
        update(handle, number / 20)
        phases.append(handle.phase)
        slopes.append(handle.policy.slope)
        if number == 4:
            assert handle.teacher.model is None
            with torch.no_grad():
                handle.model.classifier.bias.fill_(7.0)
        if number == 5:
            with torch.no_grad():
                handle.model.classifier.bias.fill_(9.0)
    assert phases == ["warmup"] * 5 + ["ramp"] * phases.count("ramp") + ["recovery"] * phases.count(
        "recovery"
    )
    assert phases.count("ramp") >= 2 and phases.count("recovery") >= 2
    assert slopes == sorted(slopes) and slopes[5] == 10.0 and slopes[-1] == pytest.approx(1e5)
    ramp = torch.tensor(slopes[5 : 5 + phases.count("ramp")]).log()
    assert torch.allclose(ramp.diff(), ramp.diff()[0].expand(len(ramp) - 1), atol=1e-4)
    assert (handle.teacher.model.classifier.bias == 7.0).all()


def test_thresholds_stay_in_their_range_after_every_step() -> None:
    handle = dropping(tiny_bert(), eta=0.5, threshold_lr=10.0)
    thresholds, _ = handle.auxiliary_groups()
    optimizer = torch.optim.Adam(thresholds.parameters, lr=5.0)
    for number in range(1, 5):
        for parameter in thresholds.parameters:
            parameter.grad = torch.tensor([1.0, -1.0])
        optimizer.step()
        update(handle, number / 50)
        assert (handle.policy.eta_K >= 0.01).all() and (handle.policy.eta_K <= 1.0).all()
        assert (handle.policy.theta_K > 0).all()
    assert handle.policy.eta_K.tolist() == pytest.approx([0.01, 1.0])


def test_nothing_moves_if_a_step_is_done_again() -> None:
    handle = dropping(tiny_bert(), eta=0.9, target_tokens=0.3)
    handle.goal.totals = [0.9, 1.0, 0.9, 1.0, 0.0, 0.9, 1.0]
    for progress in (0.1, 0.9):
        update(handle, progress)
        before = (handle.multiplier, handle.threshold_lr, handle.policy.scale.item())
        update(handle, progress)
        assert (handle.multiplier, handle.threshold_lr, handle.policy.scale.item()) == before
    assert handle.multiplier > 1.0 and handle.policy.scale > 1.0


def test_removal_stays_hard_where_a_second_fit_begins_in_recovery() -> None:
    handle = prepare(classifier("bert"), ContributionTokenDroppingConfig())
    for progress in (0.0, 0.5, 1.0, 0.0):
        update(handle, progress)
    assert handle.phase == "recovery" and handle.policy.slope == handle.config.slope_end
    handle.policy.slope = 1.0
    handle.load_state_dict(handle.state_dict())
    assert handle.policy.slope == handle.config.slope_end


def test_a_second_fit_that_begins_in_recovery_keeps_to_the_target() -> None:
    handle = prepare(classifier("bert"), ContributionTokenDroppingConfig(target_tokens=0.5))
    for progress in (0.0, 0.5, 1.0, 0.0):
        update(handle, progress)
    handle.goal.totals = [0.6, 1.0, 0.6, 1.0, 0.0, 0.6, 1.0]  # 0.6 of the tokens, more than asked for
    before = float(handle.policy.scale)
    update(handle, 0.1)  # in the warm-up of this fit, where nothing is scheduled to leave yet
    assert float(handle.policy.scale) > before


def test_thresholds_learn_in_float32_in_a_bf16_model_and_are_deployed_in_bf16() -> None:
    handle = prepare(classifier("bert"), ContributionTokenDroppingConfig())
    handle.model.to(torch.bfloat16)
    assert handle.policy.eta_K.dtype == handle.policy.scale.dtype == torch.float32
    convert(handle)
    encoder = packed_encoder(handle.model)
    assert encoder is not None
    assert {t.dtype for t in encoder.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bf16_model_evaluates_as_it_is_deployed_and_loaded(when: str, tmp_path: Path) -> None:
    model = classifier("bert")
    handle = dropping(model.bfloat16() if when == "before" else model, eta=1.0)
    model.bfloat16()
    with torch.no_grad():
        for predictor in handle.policy.predictors.values():
            predictor[2].weight.zero_()
        handle.policy.scale.fill_(1.001)  # the nearest number in bf16 is 1, the mean share, which all have
    _, kept = hard_pass(handle, texts())
    plan = CompressionPlan("bert", (MethodRecord(STEM, "converted", {}, convert(handle)),))
    logits, packed_kept = packed_pass(model, texts())
    assert packed_kept == kept and len(kept[-1]) == int(texts()["attention_mask"].sum())
    attach_plan(model, plan)
    save_pretrained(model, tmp_path / "model")
    loaded, loaded_kept = packed_pass(load(tmp_path / "model"), texts())
    assert loaded_kept == kept and torch.equal(loaded, logits)


def test_the_target_falls_between_the_warm_up_and_the_end_of_the_ramp() -> None:
    goal = prepare(tiny_bert(), ContributionTokenDroppingConfig(target_flops=0.25, warmup=0.2)).goal
    targets = [goal.scheduled(progress) for progress in (0.0, 0.2, 0.36, 0.53, 0.95)]
    assert targets == pytest.approx([1.0, 1.0, 0.5, 0.25, 0.25], rel=0.01)
    assert (goal.start, goal.end, goal.unit) == (0.2, 0.6, "flops")


@pytest.mark.parametrize(
    ("settings", "target", "unit"),
    [
        ({}, 0.5, "flops"),
        ({"target_flops": 0.3}, 0.3, "flops"),
        ({"target_tokens": 0.3}, 0.3, "tokens"),
        ({"length_weight": 0.1}, None, "flops"),
    ],
    ids=str,
)
def test_the_goal_is_the_users(settings: dict[str, float], target: float | None, unit: str) -> None:
    goal = prepare(tiny_bert(), ContributionTokenDroppingConfig(**settings)).goal
    assert (goal.target, goal.unit) == (target, unit)


@pytest.mark.parametrize("settings", [{"target_flops": 0.5}, {"target_tokens": 0.5}, {"length_weight": 0.1}])
def test_a_step_measures_the_expected_tokens_of_its_pass(settings: dict[str, float]) -> None:
    handle = dropping(tiny_bert(), **settings)
    inputs = {n: v.clamp(max=39) for n, v in texts().items()}
    step(handle, inputs, torch.tensor([0, 1, 1, 0]))
    assert handle.goal.ratio == 1.0, "until the pass has ended"
    handle.end_pass()
    lengths_B = inputs["attention_mask"].sum(1)
    counts_BL = torch.stack([record.count_B for record in handle.tape.read(ExpectedTokens)], 1).detach()
    kept = float(counts_BL.sum() / (2 * lengths_B.sum()))
    spent = DroppingCosts.of(handle.model).flops(counts_BL, lengths_B).sum()
    dense = count_flops(tiny_bert(), lengths_B.tolist()).total
    assert handle.goal.tokens_kept == handle.metrics()["tokens_kept"] == pytest.approx(kept) and kept < 1.0
    expected = kept if "target_tokens" in settings else float(spent) / dense
    assert handle.goal.ratio == handle.metrics()["ratio"] == pytest.approx(expected)


def test_the_first_passes_of_a_ramp_fade_by_its_steps_and_not_by_the_warm_up() -> None:
    handle = dropping(tiny_bert(), warmup=0.5, ramp_end=0.9)
    inputs = {n: v.clamp(max=39) for n, v in texts().items()}
    for number in range(7):
        update(handle, number / 10)
        step(handle, inputs, torch.tensor([0, 1, 1, 0]))
        handle.end_pass()
    assert handle.phase == "ramp" and handle.goal.totals[6] == pytest.approx(1.0 + 0.4)


def test_a_target_is_met_in_recovery_only() -> None:
    handle = dropping(tiny_bert(), target_tokens=0.5)
    handle.goal.totals = [0.54, 1.0, 0.54, 1.0, 0.0, 0.54, 1.0]
    assert handle.goal.is_met and not handle.is_on_target
    update(handle, 0.6)
    assert handle.phase == "recovery" and handle.is_on_target
    handle.goal.totals[0] = 0.56
    assert not handle.is_on_target


def test_the_state_survives_a_round_trip() -> None:
    handle, other = (dropping(tiny_bert(), target_tokens=0.5) for _ in range(2))
    update(handle, 0.2)
    step(handle, {n: v.clamp(max=39) for n, v in texts().items()}, torch.tensor([0, 1, 1, 0]))
    handle.end_pass()
    update(handle, 0.6)
    state = handle.state_dict()
    other.load_state_dict(state)
    assert other.goal.state_dict() == state["goal"] and other.goal.ratio == handle.goal.ratio < 1.0
    names = ("phase", "progress", "threshold_lr", "multiplier")
    assert [getattr(other, name) for name in names] == [state[name] for name in names]
    assert (other.policy.slope, other.policy.is_active) == (handle.policy.slope, True)


def test_deployed_policies_are_frozen_and_all_else_can_be_trained() -> None:
    handle = dropping(classifier())
    convert(handle)
    frozen = [name for name, p in handle.model.named_parameters() if not p.requires_grad]
    assert frozen and all(".policy.predictors." in name for name in frozen)
    assert not any(".policy." in name for name, p in handle.model.named_parameters() if p.requires_grad)
    handle.model.train()(**texts(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert [n for n, p in handle.model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_and_load_are_bit_equal(family: str) -> None:
    handle = dropping(classifier(family), layers=(0, 2), protect_tokens=(SEPARATOR,), protect_first=2)
    structure = convert(handle)
    assert structure == {
        **{"layers": [0, 2], "predictor_width": 32, "protect_first": 2, "protect_tokens": [SEPARATOR]}
    }
    fresh = classifier(family)
    restore(fresh, structure)
    fresh.load_state_dict(handle.model.state_dict())
    assert torch.equal(packed_pass(fresh, texts(family))[0], packed_pass(handle.model, texts(family))[0])


def test_restore_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = classifier()
    restore(model, {"layers": [1], "predictor_width": 4, "protect_first": 1, "protect_tokens": []})
    policy = packed_encoder(model).policy
    assert policy.predictors["1"][0].weight.is_meta and policy.eta_K.is_meta and policy.layers == (1,)


GOOD = {"layers": [0], "predictor_width": 4, "protect_first": 1, "protect_tokens": []}


@pytest.mark.parametrize(
    "bad",
    [
        {"layers": [3]},
        {"layers": [-1]},
        {"layers": [1, 1]},
        {"layers": [1, 0]},
        {"layers": []},
        {"layers": ["0"]},
        {"layers": [True]},
        {"layers": None},
        {"predictor_width": 0},
        {"predictor_width": 1.5},
        {"predictor_width": 10**9},
        {"protect_first": 0},
        {"protect_tokens": ["x"]},
        {"protect_tokens": 3},
        {"code": "x"},
    ],
    ids=str,
)
def test_a_structure_that_does_not_fit_is_refused_and_nothing_is_changed(bad: dict[str, Any]) -> None:
    model = classifier()
    with pytest.raises(PlanError, match="plan of dropped tokens"):
        restore(model, {**GOOD, **bad})
    assert not is_packed(model)


@pytest.mark.parametrize("missing", GOOD)
def test_a_structure_without_a_field_is_refused(missing: str) -> None:
    with pytest.raises(PlanError, match="plan of dropped tokens"):
        restore(classifier(), {name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"target_flops": 0.0}, r"target_flops=0.0 is outside \(0, 1\]"),
        ({"target_tokens": 1.5}, "target_tokens=1.5"),
        ({"target_flops": 0.5, "length_weight": 1.0}, "several goals"),
        ({"length_weight": -1.0}, "length_weight=-1.0 is negative"),
        ({"saliency_weight": -1.0}, "saliency_weight=-1.0"),
        ({"teacher_bits": 3}, "teacher_bits=3"),
        ({"predictor_width": 0}, r"predictor_width=0 is outside \[1, 4096\]"),
        ({"predictor_lr": 0.0}, "predictor_lr=0.0"),
        ({"protect_first": 0}, "classification token always stays"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"warmup": 0.9, "ramp_end": 0.5}, "ramp_end=0.5"),
        ({"slope_start": 0.0}, "slope_start=0.0"),
        ({"slope_start": 1e6}, "slope_start=1000000.0"),
        ({"threshold_init": 0.0}, "threshold_init=0.0"),
        ({"threshold_lr": 0.0}, "threshold_lr=0.0"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContributionTokenDroppingConfig(**bad)


def test_layers_that_do_not_exist_are_refused_before_anything_changes() -> None:
    model = classifier()
    names = [name for name, _ in model.named_modules()]
    for layers in ((3,), (-1,), ()):
        with pytest.raises(ValueError, match="must name layers from 0 to 2"):
            prepare(model, ContributionTokenDroppingConfig(layers=layers))
    assert [name for name, _ in model.named_modules()] == names and not model._forward_pre_hooks


def test_a_model_that_drops_already_is_refused() -> None:
    handle = dropping(classifier())
    with pytest.raises(ValueError, match="keep one of the two"):
        prepare(handle.model, ContributionTokenDroppingConfig())
    convert(handle)
    with pytest.raises(ValueError, match=r"is packed.*unpack"):
        prepare(handle.model, ContributionTokenDroppingConfig())


def test_protected_tokens_without_ids_are_refused() -> None:
    model = dropping(classifier(), protect_tokens=(SEPARATOR,)).model
    with pytest.raises(ValueError, match=r"tokens \[3\] are protected.*pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 32))


def test_convert_leaves_no_hooks_but_the_guard_of_protected_tokens() -> None:
    for tokens, expected in (((), 0), ((SEPARATOR,), 1)):
        handle = dropping(classifier(), protect_tokens=tokens)
        convert(handle)
        hooks = [hook for m in handle.model.modules() for hook in m._forward_pre_hooks.values()]
        assert len(hooks) == expected and not any(m._forward_hooks for m in handle.model.modules())


def test_a_copy_of_a_handle_drives_its_own_model() -> None:
    handle = dropping(classifier())
    twin = copy.deepcopy(handle)
    step(twin, texts(), torch.tensor([0, 1, 2, 0])).backward()
    convert(twin)
    assert is_packed(twin.model) and not is_packed(handle.model)
    assert handle.recorder.inputs == {}


def test_a_copy_of_a_deployed_model_guards_its_own_tokens() -> None:
    handle = dropping(classifier(), protect_tokens=(SEPARATOR,))
    convert(handle)
    expected, _ = packed_pass(handle.model, texts())
    twin = copy.deepcopy(handle.model)
    assert torch.equal(packed_pass(twin, texts())[0], expected)
    assert packed_encoder(twin).policy.guarded_BT is not packed_encoder(handle.model).policy.guarded_BT


def test_ranks_and_tokens_are_learned_in_one_run() -> None:
    configs = [
        ContributionTokenDroppingConfig(target_tokens=0.6, warmup=0.2, threshold_init=0.9),
        SoftThresholdRankConfig(target_params=0.6, rank_multiple=1, search_end=0.5),
    ]
    compressor = Compressor(classifier(), configs)
    compressor.prepare()
    batch = {**texts(), "labels": torch.tensor([0, 1, 2, 0])}
    assert all(loss.isfinite() for loss in training_steps(compressor, lambda _: batch, steps=20))
    handle: Any = compressor.handles["contribution_token_dropping"]
    logits, kept = hard_pass(handle, texts())
    plan = compressor.convert()
    packed, packed_kept = packed_pass(compressor.model, texts())
    assert packed_kept == kept and torch.allclose(packed, logits, atol=1e-4)
    assert len(kept[-1]) < int(texts()["attention_mask"].sum())
    assert [record.method for record in plan.methods] == [
        "soft_threshold_rank",
        "contribution_token_dropping",
    ]
