"""BlockQuantization as a callback: rounding at the end, or trained for, and runs that are killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_compress import load, plan_of, save_pretrained
from lightning_compress.callbacks import (
    BlockQuantization,
    BottleneckTokenDropping,
    CompressionMixin,
    Distillation,
    MultiExit,
    SoftThresholdRank,
    WidthSlimming,
    convert,
)
from lightning_compress.nn.quantized_linear import QuantizedLinear
from tests.toys import ToyModule, toy_loader, toy_trainer
from tests.toys_runs import (
    DROPOUT,
    Mixed,
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

STEM = "block_quantization"
STRENGTH = f"compress/{STEM}/strength"
TRAINED: dict[str, Any] = {"start": 0.25, "ramp_end": 0.6}


class Saved(CompressionMixin, ToyModule): ...


def fitted(*callbacks: Any, module: ToyModule | None = None, **settings: Any) -> Any:
    module = module or ToyModule()
    toy_trainer(callbacks=list(callbacks), **{"max_steps": 8, **settings}).fit(
        module, toy_loader(), toy_loader(16)
    )
    return module.eval()


def answer(module: Any) -> Tensor:
    with torch.no_grad():
        return module.model.eval()(next(iter(toy_loader(16, 16)))["input_ids"]).logits


def quantised(module: Any) -> int:
    return sum(isinstance(part, QuantizedLinear) for part in module.modules())


def test_by_default_the_run_is_what_it_would_be_and_rounded_in_the_end() -> None:
    plain, rounded, watch = fitted(), fitted(BlockQuantization(convert=False)), Watch()
    assert torch.equal(answer(rounded), answer(plain)) and quantised(rounded) == 0
    module = fitted(BlockQuantization(), watch, log_every_n_steps=1)
    assert quantised(module) == 12 and torch.allclose(answer(module), answer(plain), atol=0.02)
    assert {step[STRENGTH] for step in watch.seen} == {0.0}


@pytest.mark.parametrize("start", [0.25, 1.0])
def test_what_is_excluded_stays_dense_beside_attention_in_integers(start: float) -> None:
    method = BlockQuantization(start=start, operators="all", exclude=("*.query", "*.value"))
    module = fitted(method)
    attention = module.model.bert.encoder.layer[0].attention.self
    kinds = [type(part) for part in (attention.query, attention.key, attention.value)]
    assert kinds == [nn.Linear, QuantizedLinear, nn.Linear] and quantised(module) == 8


def test_weights_that_are_not_finite_are_refused_before_a_step() -> None:
    module, watch = ToyModule(), Watch()
    module.model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense holds NaN"):
        fitted(BlockQuantization(), watch, module=module, log_every_n_steps=1)
    assert watch.seen == []


def test_the_strength_that_is_logged_ramps() -> None:
    watch = Watch()
    fitted(BlockQuantization(**TRAINED), watch, log_every_n_steps=1)
    expected = [min(max((step / 8 - 0.25) / 0.35, 0.0), 1.0) for step in range(8)]
    assert [step[STRENGTH] for step in watch.seen] == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_validation_scores_the_model_to_come(precision: Any) -> None:
    module = fitted(BlockQuantization(**TRAINED, operators="all", convert=False), precision=precision)
    trainer = toy_trainer(precision=precision)
    before = trainer.validate(module, toy_loader(16), verbose=False)
    convert(module)
    assert quantised(module) == 12
    assert trainer.validate(module, toy_loader(16), verbose=False) == before


def test_a_run_that_ends_before_all_of_the_rounding_was_seen_is_told() -> None:
    with pytest.warns(UserWarning, match="block_quantization.*not yet at their targets"):
        fitted(BlockQuantization(start=0.9, ramp_end=1.0))


SETS: dict[str, Any] = {
    "slim, factorised": lambda: [
        WidthSlimming(heads=2, ffn=0.5, start=0.1, end=0.3, convert=False),
        SoftThresholdRank(target_params=0.6, rank_multiple=4, convert=False),
    ],
    "exits, teacher": lambda: [
        MultiExit(threshold=0.6, dropout=0.0, convert=False),
        Distillation(start=0.3, convert=False),
    ],
    "fewer tokens": lambda: [
        BottleneckTokenDropping(removal_weight=9.0, warmup=0.0, sampler_lr=0.05, convert=False)
    ],
}


@pytest.mark.parametrize("others", SETS.values(), ids=SETS)
def test_what_is_evaluated_beside_other_methods_is_what_is_saved(others: Any, tmp_path: Path) -> None:
    module = fitted(*others(), BlockQuantization(**TRAINED, operators="all", convert=False), max_steps=10)
    evaluated = answer(module)
    convert(module)
    assert torch.allclose(answer(module), evaluated, atol=1e-4)
    save_pretrained(module, tmp_path)
    model: Any = load(tmp_path)
    with torch.no_grad():
        again = model(next(iter(toy_loader(16, 16)))["input_ids"]).logits
    assert torch.equal(again, answer(module)) and quantised(model) >= 12


def run(callbacks: Any, *, ckpt_path: Path | None = None, seed: int = 0, **settings: Any) -> dict[str, Any]:
    method = BlockQuantization(**{**TRAINED, "operators": "all", "convert": False, **settings})
    sizes: dict[str, Any] = {"num_hidden_layers": 1, **DROPOUT}
    module = Scheduled(**sizes)
    return run_to_the_end(module, [method, *callbacks], None, ckpt_path, seed)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_killed_after_any_step_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, phases = run([every_step(tmp_path)]), []
    assert whole["phases"] == {STEM: "rounded"}
    for step, saved, resumed in resumptions(run, (1, 4, 6, 9), tmp_path, STEM):
        phases.append(saved["phase"])
        assert differences(whole, resumed) == [], f"resumed after step {step}"
    assert set(phases) == {"float", "ramp", "rounded"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("step", "hook"), [(5, "on_after_backward"), (8, "on_validation_end")])
def test_a_run_interrupted_in_the_midst_of_a_step_resumes_without_a_trace(
    step: int, hook: str, tmp_path: Path
) -> None:
    assert differences(run([]), interrupted_and_resumed(run, step, hook, tmp_path)) == []


def test_checkpoints_of_both_forms_open_again(tmp_path: Path) -> None:
    module, method = Saved(), BlockQuantization(**TRAINED, convert=False)
    trainer = toy_trainer(callbacks=[method], max_steps=8)
    trainer.fit(module, toy_loader())
    trainer.save_checkpoint(tmp_path / "training.ckpt")
    convert(module)
    trainer.save_checkpoint(tmp_path / "converted.ckpt")
    expected = answer(module)
    for form, count in (("training", 0), ("converted", 12), ("training", 0)):
        trainer.test(module, toy_loader(8), ckpt_path=tmp_path / f"{form}.ckpt", verbose=False)
        assert quantised(module) == count and torch.equal(answer(module), expected)
    fresh = Saved.load_from_checkpoint(tmp_path / "converted.ckpt", weights_only=True)
    assert quantised(fresh) == 12 and torch.equal(answer(fresh), expected)
    assert plan_of(module) is None and plan_of(fresh) is not None


def test_what_is_left_to_learn_is_fine_tuned_after_conversion() -> None:
    module = fitted(BlockQuantization())
    before, bias = answer(module), module.model.bert.encoder.layer[0].output.dense.bias.clone()
    toy_trainer(max_steps=4).fit(module.train(), toy_loader())
    assert not torch.equal(module.model.bert.encoder.layer[0].output.dense.bias, bias)
    assert quantised(module) == 12 and not torch.equal(answer(module), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch's own, as it traces
def test_a_compiled_run_does_not_depend_on_the_strength() -> None:
    answers = []
    for is_compiled in (False, True):
        torch.compiler.reset()
        counters.clear()
        module = ToyModule(num_hidden_layers=1)
        if is_compiled:
            module.model.compile(backend="eager")  # type: ignore[union-attr]
        answers.append(answer(fitted(BlockQuantization(**TRAINED, operators="linear"), module=module)))
    assert dict(counters["graph_break"]) == {} and counters["stats"]["unique_graphs"] <= 8
    assert torch.allclose(*answers, atol=1e-5)
    torch.compiler.reset()


@ignore_warnings_of_processes
def test_two_processes_round_alike_and_the_caller_holds_the_quantised_model() -> None:
    module = Mixed()
    two_processes(callbacks=[BlockQuantization(**TRAINED, operators="all")]).fit(module, toy_loader(64))
    plan = plan_of(module)
    assert quantised(module) == 12 and plan is not None and plan.is_converted
