"""WidthSlimming as a callback: its course, what is left, runs that are killed and resumed, processes, company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model

from lightning_compress import load, save_pretrained
from lightning_compress.callbacks import (
    BottleneckTokenDropping,
    Distillation,
    MultiExit,
    SoftThresholdRank,
    WidthSlimming,
)
from lightning_compress.nn.flops import count_parameters
from lightning_compress.nn.importance import ImportanceMeter
from lightning_compress.nn.width_slimming import WidthGates
from lightning_compress.runtime import pack, packed_encoder
from tests.toys import ToyModule, tiny_bert, toy_loader, toy_trainer
from tests.toys_runs import (
    DROPOUT,
    Mixed,
    SameOnAllRanks,
    Scheduled,
    Watch,
    differences,
    every_step,
    ignore_warnings_of_processes,
    interrupted_and_resumed,
    resumptions,
    run_to_the_end,
    two_processes,
)

STEM = "width_slimming"
PREFIX = f"compress/{STEM}"
BATCH = {"input_ids": torch.tensor([[3, 5, 7, 9], [4, 6, 8, 0]]), "attention_mask": torch.ones(2, 4).long()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def test_the_course_of_slimming_is_logged_and_the_model_is_small_in_the_end() -> None:
    watch, module = Watch(), ToyModule()
    method = WidthSlimming(heads=2, ffn=16, embedding_rank=12)
    toy_trainer(callbacks=[method, watch], max_steps=12, log_every_n_steps=1).fit(module, toy_loader())
    ratios = [step[f"{PREFIX}/neurons_ratio"] for step in watch.seen]
    assert ratios[0] == 1.0 and ratios[-1] == 0.25 and ratios == sorted(ratios, reverse=True)
    assert watch.seen[-1][f"{PREFIX}/heads_ratio"] == 0.5
    assert watch.seen[-1][f"{PREFIX}/embedding_rank"] == 12.0
    layer = module.model.bert.encoder.layer[0]
    assert layer.attention.self.query.out_features == 16 and layer.intermediate.dense.out_features == 16
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_the_price_of_learned_gates_is_logged_while_they_are_searched() -> None:
    watch, module = Watch(), ToyModule()
    method = WidthSlimming(criterion="l0", start=0.25, end=0.75)
    toy_trainer(callbacks=[method, watch], max_steps=12, log_every_n_steps=1).fit(module, toy_loader())
    prices = [step.get(f"{PREFIX}/size") for step in watch.seen]
    assert prices[:3] == [None] * 3 and None not in prices[3:]
    assert len({float(price) for price in prices[8:]}) == 1  # the last one stays in sight
    assert count_parameters(module.model).encoder <= 0.5 * count_parameters(tiny_bert()).encoder


def test_what_is_left_is_saved_opened_and_packed(tmp_path: Path) -> None:
    module = ToyModule()
    toy_trainer(callbacks=[WidthSlimming(target_params=0.4, scope="total")]).fit(module, toy_loader())
    save_pretrained(module, tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(module.model))
    assert count_parameters(again).total <= 0.4 * count_parameters(tiny_bert()).total
    before = logits(again)
    assert torch.allclose(logits(pack(again)), before, atol=1e-5)


def test_a_run_that_is_stopped_early_is_converted_at_its_target_with_a_warning() -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    module = ToyModule()
    trainer = toy_trainer(callbacks=[WidthSlimming(heads=1, ffn=8), Stops()], max_steps=16)
    with pytest.warns(UserWarning, match="training ended in phase slimming"):
        trainer.fit(module, toy_loader())
    assert module.model.bert.encoder.layer[1].intermediate.dense.out_features == 8


def test_importance_does_not_depend_on_clipping_or_accumulation_order() -> None:
    kept = []
    for settings in ({}, {"gradient_clip_val": 1e-3}):
        module = ToyModule()
        method = WidthSlimming(heads=2, ffn=8, start=0.0, end=0.4, steps=1)
        trainer = toy_trainer(callbacks=[method], max_steps=5, accumulate_grad_batches=2, **settings)
        trainer.fit(module, toy_loader())
        plan = module.__dict__["_compression"].compressor.plan.methods[0]
        kept.append(plan.structure["heads"])
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "company",
    [
        lambda: [SoftThresholdRank(target_params=0.5, rank_multiple=4)],
        lambda: [BottleneckTokenDropping(removal_weight=9.0, sampler_lr=0.05)],
        lambda: [MultiExit(threshold=0.5)],
        lambda: [SoftThresholdRank(target_params=0.5, rank_multiple=4), MultiExit(threshold=0.5)],
    ],
    ids=["ranks", "tokens", "exits", "ranks and exits"],
)
@pytest.mark.filterwarnings("ignore:training ended in phase")  # twelve steps may miss a target
def test_other_methods_take_part_in_any_order(company: Any, tmp_path: Path) -> None:
    names = []
    for turn in (1, -1):
        module = ToyModule()
        callbacks = [WidthSlimming(heads=2, ffn=32), *company()][::turn]
        toy_trainer(callbacks=callbacks, max_steps=12).fit(module, toy_loader())
        names.append({name: tuple(p.shape) for name, p in module.model.named_parameters()})
        assert count_parameters(module.model).encoder < count_parameters(tiny_bert()).encoder
    assert list(names[0]) == list(names[1])
    save_pretrained(module, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(module.model))


@pytest.mark.filterwarnings("ignore:training ended in phase")
def test_the_gated_model_of_low_rank_layers_computes_what_is_left_of_it() -> None:
    module = ToyModule()
    callbacks = [WidthSlimming(heads=2, ffn=32), SoftThresholdRank(target_params=0.9, rank_multiple=1)]
    trainer = toy_trainer(callbacks=callbacks, max_steps=12)
    for callback in callbacks:
        callback.convert_at_end = False
    trainer.fit(module, toy_loader())
    gates = WidthGates.of(module.model)
    assert gates is not None and not gates.is_open
    before = logits(module.model)
    module.__dict__["_compression"].compressor.convert()
    assert torch.allclose(logits(module.model), before, atol=1e-4)


@pytest.mark.parametrize("criterion", ["taylor", "per_exit"])
def test_a_separate_pass_asks_all_exits(criterion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    add = ImportanceMeter.add
    monkeypatch.setattr(ImportanceMeter, "add", lambda *args: (passes.append(1), add(*args)))
    module = ToyModule(num_hidden_layers=3)
    method = WidthSlimming(heads=2, ffn=32, hidden=24, criterion=criterion, calibration_batches=2)
    toy_trainer(callbacks=[method, MultiExit(threshold=0.5)], max_steps=12).fit(module, toy_loader())
    assert len(passes) == 2 * 2 * (3 if criterion == "per_exit" else 1)  # steps, batches, exits
    assert module.model.exits["0"].classifier.in_features == 24


def test_a_hidden_width_that_other_methods_do_not_allow_is_refused_before_training() -> None:
    callbacks = [WidthSlimming(hidden=24), BottleneckTokenDropping()]
    with pytest.raises(ValueError, match="hidden width of this BertForSequenceClassification cannot change"):
        toy_trainer(callbacks=callbacks).fit(ToyModule(), toy_loader())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_are_slimmed_by_learned_gates() -> None:
    module = ToyModule()
    module.model = get_peft_model(
        module.model, LoraConfig(r=2, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    )
    with pytest.raises(ValueError, match="weights that are frozen"):
        toy_trainer(callbacks=[WidthSlimming()]).fit(module, toy_loader())
    method = WidthSlimming(criterion="l0", target_params=0.6)
    toy_trainer(callbacks=[method], max_steps=8).fit(module, toy_loader())
    layer = module.model.base_model.model.bert.encoder.layer[0]
    assert layer.attention.self.query.base_layer.out_features < 32
    assert layer.attention.self.query.lora_B["default"].out_features < 32
    assert (
        layer.output.dense.lora_A["default"].in_features == layer.intermediate.dense.base_layer.out_features
    )


def test_slimming_shows_in_the_shapes_that_a_packed_encoder_runs() -> None:
    module = ToyModule()
    callbacks = [WidthSlimming(heads=2, ffn=32), MultiExit(threshold=0.0)]
    toy_trainer(callbacks=callbacks, max_steps=8).fit(module, toy_loader())
    encoder = packed_encoder(module.model)
    assert encoder is not None
    assert {slot.shape for name, slot in module.model.named_parameters() if "intermediate" in name} == {
        torch.Size([32, 32]),
        torch.Size([32]),
    }


def run(
    callbacks: list[Callback],
    ckpt_path: Path | None = None,
    seed: int = 0,
    company: tuple[Any, ...] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Fit with dropout; return what must be equal at the end."""
    method = WidthSlimming(**{"target_params": 0.5, "convert": False, **settings})
    callbacks = [method, *(other(convert=False) for other in company), *callbacks]
    return run_to_the_end(Scheduled(**DROPOUT), callbacks, ckpt_path=ckpt_path, seed=seed)


VARIANTS: dict[str, dict[str, Any]] = {
    "everything by target": {"scope": "total", "ranking": "global"},
    "separate pass": {"calibration_batches": 2, "criterion": "group_taylor"},
    "learned gates": {"criterion": "l0"},
    "teacher and exits": {
        "calibration_batches": 2,
        "importance_loss": "official",
        "company": (MultiExit, Distillation),
    },
}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_run_killed_in_any_phase_ends_as_the_uninterrupted_one(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    whole = run([every_step(tmp_path)], **variant)
    assert whole["phases"][STEM] == "recovery"
    phases = []
    for step, saved, resumed in resumptions(run, (1, 3, 5, 7, 10), tmp_path, STEM, **variant):
        phases.append(saved["phase"])
        assert differences(whole, resumed) == [], f"resumed after step {step}"
    assert set(phases) == {"warmup", "slimming", "recovery"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step"])
def test_an_exception_in_mid_batch_leaves_no_trace_after_resuming(hook: str, tmp_path: Path) -> None:
    variant = VARIANTS["separate pass"]
    whole = run([], **variant)
    for step in (3, 5):
        resumed = interrupted_and_resumed(run, step, hook, tmp_path, **variant)
        assert differences(whole, resumed) == [], f"stopped in step {step}"


class Alike(SameOnAllRanks):
    """Compares what was gathered too."""

    def state_of(self, handle: Any) -> tuple[Any, ...]:
        return *super().state_of(handle), handle.counts


@ignore_warnings_of_processes
@pytest.mark.parametrize("settings", [{"scope": "total"}, {"calibration_batches": 2}, {"criterion": "l0"}])
def test_two_processes_prune_alike(settings: dict[str, Any]) -> None:
    module = Mixed(hidden_dropout_prob=0.1)
    method = WidthSlimming(target_params=0.5, ranking="global", **settings)
    two_processes(callbacks=[method, Alike()]).fit(module, toy_loader(64))
    scope = settings.get("scope", "encoder")
    dense = getattr(count_parameters(tiny_bert()), scope)
    assert getattr(count_parameters(module.model), scope) <= 0.5 * dense
