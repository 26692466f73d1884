"""SoftThresholdRank as four verbs, over every family and its own bounds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_compress.methods import restore as restore_plan
from lightning_compress.methods.soft_threshold_rank import (
    SoftThresholdRankConfig,
    SoftThresholdRankHandle,
    convert,
    pin,
    prepare,
    restore,
    update,
)
from lightning_compress.nn.flops import count_parameters
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from lightning_compress.nn.surgery import Ledger, successors_of
from lightning_compress.nn.width_surgery import Widths, apply_widths, restore_widths
from lightning_compress.plan import CompressionPlan, MethodRecord, PlanError
from tests.toys import tiny_bert

SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "electra": {**SMALL, "embedding_size": 8},
    "distilbert": {"vocab_size": 30, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
    "gpt2": {"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {**SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
    "mamba": {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
DECODERS = ("gpt2", "llama", "mamba")


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if family in DECODERS else AutoModelForSequenceClassification
    return kind.from_config(CONFIG_MAPPING[family](**CONFIGS[family])).eval()


def config(**settings: Any) -> SoftThresholdRankConfig:
    return SoftThresholdRankConfig(**{"rank_multiple": 1, **settings})


def ids() -> torch.Tensor:
    return torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", CONFIGS)
def test_prepare_keeps_the_outputs_and_convert_keeps_what_was_trained(family: str) -> None:
    model = tiny(family)
    dense = model(ids()).logits
    handle = prepare(model, config(target_params=0.5))
    assert torch.allclose(model(ids()).logits, dense, atol=1e-5)
    pin(handle)
    unfused = model(ids()).logits
    linear = count_parameters(model).linear
    structure = convert(handle)
    assert torch.allclose(model(ids()).logits, unfused, atol=1e-5)
    assert count_parameters(model).linear == linear == handle.size <= handle.budget
    assert not any(isinstance(m, SoftThresholdLinear) for m in model.modules())
    low_rank = {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert structure == {"ranks": low_rank} and low_rank


@pytest.mark.parametrize("family", CONFIGS)
def test_restore_and_load_give_bit_equal_outputs(family: str) -> None:
    model = tiny(family)
    handle = prepare(model, config(target_params=0.5))
    structure = convert(handle)
    fresh = tiny(family)
    restore(fresh, structure)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_zero_compression_is_the_dense_model_again(family: str) -> None:
    model, dense = tiny(family), tiny(family)
    structure = convert(prepare(model, config(target_params=1.0)))
    assert structure == {"ranks": {}}
    assert torch.allclose(model(ids()).logits, dense(ids()).logits, atol=1e-5)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in dense.named_modules()]
    assert model.state_dict().keys() == dense.state_dict().keys()


def walk(handle: SoftThresholdRankHandle, steps: int = 20) -> list[str]:
    phases = []
    for step in range(steps):
        update(handle, step / steps)
        phases.append(handle.phase)
    return phases


def test_the_phases_follow_the_schedule() -> None:
    handle = prepare(tiny_bert(), config(target_params=0.5, warmup=0.1, search_end=0.5))
    phases = walk(handle)
    assert phases == ["warmup"] * 2 + ["search"] * 8 + ["recovery"] * 10
    assert handle.is_on_target and handle.size <= handle.budget


def test_the_search_ends_as_soon_as_the_size_is_within_the_budget() -> None:
    handle = prepare(tiny_bert(), config(target_params=0.5, warmup=0.0, search_end=1.0))
    update(handle, 0.0)
    update(handle, 0.05)
    assert handle.phase == "search"
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.alpha.copy_((layer.sigma_M / layer.scale).sort(descending=True).values[8])
    update(handle, 0.1)
    assert handle.phase == "recovery" and handle.size <= handle.budget


def test_each_change_of_phase_asks_for_fresh_moments_of_the_factors() -> None:
    handle = prepare(tiny_bert(), config(target_params=0.5, warmup=0.1, search_end=0.5))
    handle.pop_stale_moments()
    counts = []
    for step in range(10):
        update(handle, step / 10)
        counts.append(len(handle.pop_stale_moments()))
    assert counts == [0, 48, 0, 0, 0, 48, 0, 0, 0, 0]


def test_thresholds_rest_outside_the_search_and_can_cross_the_spectrum_within_it() -> None:
    handle = prepare(tiny_bert(), config(target_params=0.5, warmup=0.1, search_end=0.5))
    rates = []
    for step in range(100):
        update(handle, step / 100)
        rates.append(handle.auxiliary_lr)
    assert set(rates[:10]) == {0.0} and set(rates[50:]) == {0.0}
    cut = sum(float(layer.sigma_M.detach().median()) for layer in handle.layers.values()) / len(handle.layers)
    assert sum(rates) > cut


def test_the_scheduled_budget_goes_from_dense_to_the_target() -> None:
    handle = prepare(tiny_bert(), config(target_params=0.25, warmup=0.1, search_end=0.6))
    budgets = []
    for progress in (0.0, 0.1, 0.3, 0.5, 0.9):
        handle.progress = progress
        budgets.append(handle.scheduled_budget)
    assert budgets[0] == budgets[1] == handle.dense_size
    assert budgets[2] == pytest.approx(handle.dense_size * 0.5)
    assert budgets[3] == budgets[4] == pytest.approx(handle.budget)


@pytest.mark.parametrize("scope", ["linear", "encoder", "total"])
def test_the_target_counts_the_scope_it_names(scope: str) -> None:
    model = tiny_bert()
    before = getattr(count_parameters(model), scope)
    convert(prepare(model, config(target_params=0.7, scope=scope)))
    after = getattr(count_parameters(model), scope)
    assert 0.6 * before < after <= 0.7 * before


def test_a_model_cast_after_prepare_converts_to_one_dtype() -> None:
    model = tiny_bert()
    handle = prepare(model, config(target_params=0.8))
    model.to(torch.bfloat16)
    assert len(convert(handle)["ranks"]) < len(handle.layers)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(ids()).logits.isfinite().all()


def test_a_plan_for_another_family_or_in_training_form_or_of_an_unknown_method_is_refused() -> None:
    with pytest.raises(PlanError, match="model_type 'gpt2'"):
        restore_plan(tiny_bert(), CompressionPlan("gpt2"))
    with pytest.raises(PlanError, match="training form"):
        restore_plan(tiny_bert(), CompressionPlan("bert", (MethodRecord("soft_threshold_rank", "prepared"),)))
    with pytest.raises(PlanError, match="unknown method 'magic'"):
        restore_plan(tiny_bert(), CompressionPlan("bert", (MethodRecord("magic", "converted"),)))


def test_restore_works_on_the_meta_device_without_allocating() -> None:
    with torch.device("meta"):
        model = tiny_bert()
    restore(model, {"ranks": {"bert.encoder.layer.0.attention.self.query": 4}})
    assert model.bert.encoder.layer[0].attention.self.query.down.weight.is_meta


def test_a_deepcopy_of_the_handle_drives_its_own_model() -> None:
    handle = prepare(tiny_bert(), config(target_params=0.5))
    twin = copy.deepcopy(handle)
    convert(twin)
    assert any(isinstance(m, LowRankLinear) for m in twin.model.modules())
    assert not any(isinstance(m, LowRankLinear) for m in handle.model.modules())


def narrow(family: str) -> Widths:
    neurons = tuple(range(0, 24 if family != "gpt2" else 64, 3))
    hidden = tuple(range(12)) if family in ("gpt2", "llama") else None
    return Widths(heads=((1,), None), neurons=(None, neurons), hidden=hidden)


@pytest.mark.parametrize("phase", ["warmup", "search", "recovery"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_what_was_narrowed_meanwhile_converts_to_its_narrow_form(family: str, phase: str) -> None:
    model = tiny(family)
    handle = prepare(model, config(target_params=0.5, warmup=0.2, search_end=1.0))
    while handle.phase != phase:
        update(handle, handle.progress + 0.05) if phase == "search" else pin(handle)
    before, ledger = dict(model.named_parameters()), Ledger(model)
    apply_widths(model, narrow(family), ledger)
    if phase == "recovery":  # otherwise converting still chooses the ranks
        narrowed = model(ids()).logits
    structure = convert(handle)
    if phase == "recovery":
        assert torch.allclose(model(ids()).logits, narrowed, atol=1e-5)
    fresh = tiny(family)
    restore_widths(fresh, narrow(family).to_structure())
    restore(fresh, structure)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids()).logits, model(ids()).logits)
    found, now = successors_of([ledger, handle.ledger]), {id(p) for p in model.parameters()}
    kept = {id(p) for name, p in before.items()} & now
    reached = {id(heir) for name, p in before.items() for heir in found.get(id(p), [])}
    assert reached | kept == now
    for done in (handle.ledger, ledger):
        done.revert()
    shapes = {name: tensor.shape for name, tensor in tiny(family).state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_a_narrowed_layer_that_stays_dense_keeps_all_it_computes() -> None:
    model = tiny("bert")
    handle = prepare(model, config(target_params=1.0))
    update(handle, 0.1)
    apply_widths(model, Widths(((0,), (0,)), ((0, 1), (0, 1))), Ledger(model))
    expected = model(ids()).logits
    assert convert(handle) == {"ranks": {}}
    assert torch.allclose(model(ids()).logits, expected, atol=1e-5)
