"""What every method must do, and every ordered pair of methods."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, load, plan_of, save_pretrained
from lightning_compress.methods import METHODS, config_from_dict, restore
from lightning_compress.nn.flops import count_parameters
from lightning_compress.plan import CompressionPlan
from lightning_compress.runtime import pack, packed_encoder
from tests.conformance.cases import CASES, Case
from tests.toys import ToyModule, ToyTexts, tiny_bert, toy_loader, toy_trainer
from tests.toys_training import training_steps

pytestmark = pytest.mark.parametrize("stem", list(METHODS))


@pytest.fixture
def case(stem: str) -> Case:
    return CASES[stem]


def batch() -> dict[str, torch.Tensor]:
    rows = [ToyTexts()[i] for i in range(8)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch()["input_ids"]).logits


def spent(model: nn.Module, case: Case) -> int:
    """What a method saves: bytes, tokens that enter the layers, or else parameters."""
    if case.shrinks == "bits":
        return sum(held.numel() * held.element_size() for held in model.state_dict().values())
    if case.shrinks != "tokens":
        return count_parameters(model).total
    logits(pack(model))
    return sum(segments.num_rows for segments in packed_encoder(model).latest)


def reopened(folder: Path, case: Case) -> nn.Module:
    """A saved model; one in which nothing is left of a method is a plain one."""
    if case.shrinks != "nothing":
        return load(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    attach_plan(model, CompressionPlan(model.config.model_type))
    return model


def hooks_of(model: nn.Module) -> list[tuple[str, str]]:
    """Where hooks are, and of what kind; a deployed model has those that it needs to run, such as for exits."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, type(hook).__qualname__)
        for name, module in model.named_modules()
        for kind in kinds
        for hook in getattr(module, kind).values()
    ]


def trained(*cases: Case, steps: int = 10) -> Compressor:
    """A compressor whose model went through a short training, ready to convert."""
    compressor = Compressor(tiny_bert(), [case.compressing for case in cases])
    compressor.prepare()
    for loss in training_steps(compressor, lambda _: batch(), steps):
        assert loss.isfinite()
    return compressor


def test_zero_compression_is_the_identity_before_and_after_convert(case: Case) -> None:
    dense = logits(tiny_bert())
    compressor = Compressor(tiny_bert(), [case.identity])
    compressor.prepare()
    assert torch.allclose(logits(compressor.model), dense, atol=1e-5)
    if case.shrinks == "bits":  # there are fewer of them whatever the settings
        assert spent(compressor.model, case) == spent(tiny_bert(), case)
        return
    compressor.convert()
    assert torch.allclose(logits(compressor.model), dense, atol=1e-5)
    assert spent(compressor.model, case) == spent(tiny_bert(), case)


def test_every_new_parameter_is_trained_by_someone(case: Case) -> None:
    compressor = Compressor(tiny_bert(), [case.compressing])
    compressor.prepare()
    everyone = {id(p) for p in compressor.model.parameters() if p.requires_grad}
    users, own = compressor.trainable_parameters(), compressor.auxiliary_parameters()
    assert {id(p) for p in [*users, *own]} == everyone and len(users) + len(own) == len(everyone)


def test_training_lowers_the_loss(case: Case) -> None:
    before = float(tiny_bert()(**batch()).loss.detach())
    after = float(trained(case, steps=20).model(**batch()).loss.detach())
    assert after < before


def test_preparing_twice_raises(case: Case) -> None:
    compressor = Compressor(tiny_bert(), [case.compressing])
    compressor.prepare()
    with pytest.raises(ValueError, match="prepared already"):
        compressor.prepare()
    compressor.convert()
    if case.shrinks == "nothing":
        compressor.prepare()  # nothing of it is left, so that there may be more of it
        return
    with pytest.raises(ValueError, match="compressed before"):
        compressor.prepare()


def test_converting_without_preparing_raises(case: Case) -> None:
    with pytest.raises(ValueError, match="not prepared"):
        Compressor(tiny_bert(), [case.compressing]).convert()


def test_convert_keeps_the_outputs_and_shrinks_as_counted(case: Case) -> None:
    compressor = trained(case)
    before, counted = logits(compressor.model), count_parameters(compressor.model)
    assert compressor.is_as_deployed
    compressor.convert()
    assert compressor.is_as_deployed
    assert torch.allclose(logits(compressor.model), before, atol=1e-5)
    assert count_parameters(compressor.model) == counted
    if case.shrinks != "bits":  # whose weights are no parameters any more
        assert counted.total == sum(p.numel() for p in compressor.model.parameters())
    before_it, after_it = spent(tiny_bert(), case), spent(compressor.model, case)
    assert after_it == before_it if case.shrinks == "nothing" else after_it < before_it


def test_a_model_as_deployed_answers_as_it_does_once_converted(case: Case) -> None:
    claims = []
    for steps in (1, 3, 6, 9, 14, 20):
        compressor = Compressor(tiny_bert(), [case.compressing])
        compressor.prepare()
        for _ in itertools.islice(training_steps(compressor, lambda _: batch(), 20), steps):
            pass
        before = logits(compressor.model)
        claims.append(compressor.is_as_deployed)
        compressor.convert()
        if claims[-1]:
            assert torch.allclose(logits(compressor.model), before, atol=1e-5), f"not so after {steps} steps"
    assert claims[-1] and claims == sorted(claims)
    is_itself_at_once = ("bottleneck_token_dropping", "multi_exit", "distillation")
    assert claims[0] == (case.compressing.stem in is_itself_at_once)


def test_restore_and_load_are_bit_equal(case: Case) -> None:
    compressor = trained(case)
    plan = CompressionPlan.from_dict(compressor.convert().to_dict())
    fresh = tiny_bert(seed=5)
    restore(fresh, plan)
    fresh.load_state_dict(compressor.model.state_dict())
    assert torch.equal(logits(fresh), logits(compressor.model))


def test_save_load_save_is_stable(case: Case, tmp_path: Path) -> None:
    compressor = trained(case)
    attach_plan(compressor.model, compressor.convert())
    save_pretrained(compressor.model, tmp_path / "one")
    again = reopened(tmp_path / "one", case)
    save_pretrained(again, tmp_path / "two")
    assert torch.equal(logits(again), logits(compressor.model))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_state_survives_a_round_trip_in_every_phase(case: Case) -> None:
    for steps in range(1, 12, 2):
        first = trained(case, steps=steps)
        second = Compressor(tiny_bert(seed=5), [case.compressing])
        second.apply_plan(first.plan)
        second.load_state_dict(first.state_dict())
        second.model.load_state_dict(first.model.state_dict())
        assert torch.equal(logits(second.model), logits(first.model))
        assert second.metrics() == first.metrics()


def test_a_plan_grows_and_shrinks_the_model(case: Case) -> None:
    compressor = trained(case)
    prepared, weights = compressor.plan, {k: v.clone() for k, v in compressor.model.state_dict().items()}
    before, state = logits(compressor.model), compressor.state_dict()
    converted = compressor.convert()
    small = {k: v.clone() for k, v in compressor.model.state_dict().items()}
    compressor.apply_plan(prepared)
    compressor.load_state_dict(state)
    compressor.model.load_state_dict(weights)
    assert torch.equal(logits(compressor.model), before)
    compressor.apply_plan(converted)
    compressor.model.load_state_dict(small)
    assert torch.allclose(logits(compressor.model), before, atol=1e-5)


def test_a_converted_model_runs_in_bf16(case: Case) -> None:
    compressor = trained(case)
    compressor.convert()
    exact, rounded = logits(compressor.model), logits(compressor.model.to(torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), exact, atol=0.05)


def test_a_converted_model_compiles(case: Case) -> None:
    compressor = trained(case)
    compressor.convert()
    compiled = torch.compile(compressor.model.eval(), backend="eager")
    assert torch.allclose(logits(compiled), logits(compressor.model), atol=1e-6)


def test_the_callback_takes_its_hooks_off_again(case: Case) -> None:
    module = ToyModule()
    toy_trainer(callbacks=[case.callback()]).fit(module, toy_loader())
    assert type(module) is ToyModule
    deployed, plan = tiny_bert(), plan_of(module.model)
    if plan is not None:
        restore(deployed, plan)
    assert hooks_of(module.model) == hooks_of(deployed)
    assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks


def test_the_callbacks_arguments_are_the_configs_fields(case: Case) -> None:
    callback = case.callback()
    parameters = inspect.signature(type(callback).__init__).parameters
    beside = ("self", "module", "convert", "teacher_model")
    own = {name: p for name, p in parameters.items() if name not in beside}
    defaults = type(case.compressing)()
    assert {name: p.default for name, p in own.items()} == {
        f.name: getattr(defaults, f.name) for f in fields(defaults)
    }
    assert callback.config == case.compressing


def test_a_model_in_evaluation_mode_as_from_pretrained_leaves_it_trains_and_has_its_mode_back(
    case: Case,
) -> None:
    module, modes = ToyModule(), []
    assert module.model is not None
    module.model.eval()
    module.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    toy_trainer(callbacks=[case.callback()]).fit(module, toy_loader())
    assert modes and all(modes)
    assert not any(part.training for part in module.model.modules())


def test_a_config_survives_plain_data_and_refuses_unknown_fields(case: Case) -> None:
    data = case.compressing.to_dict()
    assert config_from_dict(type(case.compressing), data) == case.compressing
    with pytest.raises(ValueError, match="has no fields \\['magic'\\]"):
        config_from_dict(type(case.compressing), {**data, "magic": 1})


def test_every_ordered_pair_works_in_the_canonical_order_or_is_refused(stem: str) -> None:
    for other in METHODS:
        if other == stem:
            with pytest.raises(ValueError, match="asked for twice"):
                Compressor(tiny_bert(), [CASES[stem].compressing, CASES[other].compressing])
            continue
        compressor = Compressor(tiny_bert(), [CASES[stem].compressing, CASES[other].compressing])
        if other in CASES[stem].refuses:
            with pytest.raises(ValueError, match="keep one of the two callbacks"):
                compressor.prepare()
            continue
        compressor.prepare()
        assert [r.method for r in compressor.convert().methods] == [
            m for m in METHODS if m in (stem, other) and CASES[m].shrinks != "nothing"
        ]


def test_a_model_trained_by_all_methods_but_this_one_is_deployed_as_it_was_evaluated(
    stem: str, tmp_path: Path
) -> None:
    left_out = {stem} if CASES[stem].refuses else {stem, "bottleneck_token_dropping"}
    compressor = trained(*(row for name, row in CASES.items() if name not in left_out))
    model = compressor.model
    evaluated = logits(model)
    compressor.convert()
    deployed = logits(model)
    assert torch.allclose(deployed, evaluated, atol=1e-4)
    attach_plan(model, compressor.plan)
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(load(tmp_path)), deployed)


def test_every_method_has_a_row(stem: str) -> None:
    assert set(CASES) == set(METHODS)
    assert all(a.identity.stem != b.identity.stem for a, b in itertools.combinations(CASES.values(), 2))
