"""The compressor in a bare PyTorch loop, without Lightning."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.compressor import Compressor
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.flops import count_parameters
from lightning_compress.plan import CompressionPlan, MethodRecord, PlanError
from tests.toys import tiny_bert, toy_loader


def config(**settings: float) -> SoftThresholdRankConfig:
    return SoftThresholdRankConfig(**{"target_params": 0.5, "rank_multiple": 4, **settings})


def test_the_loop_of_the_docstring_compresses() -> None:
    model = tiny_bert()
    compressor = Compressor(model, [config()])
    compressor.prepare()
    optimizer = torch.optim.AdamW(compressor.trainable_parameters(), lr=2e-5)
    batches = list(toy_loader())
    for step, batch in enumerate(batches):
        compressor.update(step / len(batches))
        compressor.begin_step()
        loss = model(**batch).loss + sum(compressor.take_loss_terms().values())
        loss.backward()
        compressor.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    assert compressor.is_on_target
    plan = compressor.convert()
    assert plan.is_converted and compressor.is_on_target and compressor.is_converted
    assert count_parameters(model).linear <= 0.5 * count_parameters(tiny_bert()).linear


def test_a_term_is_taken_once_per_step() -> None:
    compressor = Compressor(tiny_bert(), [config(warmup=0.0)])
    compressor.prepare()
    compressor.update(0.0)
    compressor.update(0.2)
    compressor.begin_step()
    assert set(compressor.take_loss_terms("soft_threshold_rank")) == {"soft_threshold_rank/size_over_budget"}
    assert compressor.take_loss_terms() == {}
    compressor.begin_step()
    assert len(compressor.take_loss_terms()) == 1


def test_stale_moments_are_cleared_in_the_users_optimizer_at_a_change_of_phase() -> None:
    compressor = Compressor(tiny_bert(), [config(warmup=0.0, search_end=0.5)])
    compressor.prepare()
    optimizer = torch.optim.AdamW(compressor.trainable_parameters(), lr=1e-3)
    (batch,) = toy_loader(4)
    for progress, factors_are_fresh in ((0.0, True), (0.2, False), (0.6, True)):
        compressor.update(progress)
        compressor.clear_stale_moments([optimizer])
        layer = next(iter(compressor.handles["soft_threshold_rank"].layers.values()))
        assert (layer.u_OM not in optimizer.state) == factors_are_fresh
        compressor.model(**batch).loss.backward()
        optimizer.step()


def test_whitening_without_training_beats_plain_truncation_on_the_same_inputs() -> None:
    batches = [{"input_ids": b["input_ids"]} for b in toy_loader()]
    dense = [tiny_bert().eval()(**b, output_hidden_states=True).hidden_states[-1].detach() for b in batches]
    errors = {}
    for init in ("svd", "whitened"):
        model = tiny_bert().eval()
        compressor = Compressor(model, [config(init=init, allocation="uniform", rank_multiple=1)])
        compressor.prepare()
        compressor.calibrate(batches)
        assert not model.training
        compressor.convert()
        outputs = [model(**b, output_hidden_states=True).hidden_states[-1].detach() for b in batches]
        errors[init] = sum(float((a - b).square().sum()) for a, b in zip(outputs, dense, strict=True))
    assert errors["whitened"] < errors["svd"]


def test_calibrating_an_unprepared_model_raises() -> None:
    with pytest.raises(ValueError, match="call prepare first"):
        Compressor(tiny_bert(), [config()]).calibrate([])


def test_the_dense_skeleton_has_the_dense_shapes_and_no_memory() -> None:
    dense = {name: p.shape for name, p in tiny_bert().named_parameters()}
    compressor = Compressor(tiny_bert(), [config()])
    compressor.prepare()
    for _ in range(2):
        skeleton = compressor.dense_skeleton()
        assert {name: p.shape for name, p in skeleton.named_parameters()} == dense
        assert all(p.is_meta for p in skeleton.parameters())
        assert not any(p.is_meta for p in compressor.model.parameters())
        if compressor.is_prepared:
            compressor.convert()


def test_a_loaded_compressed_model_remembers_what_was_done_to_it() -> None:
    first = Compressor(tiny_bert(), [config()])
    first.prepare()
    plan = first.convert()
    second = Compressor(first.model, [config(target_params=0.25)], plan=plan)
    assert second.is_converted and second.plan == plan
    assert second.take_loss_terms("soft_threshold_rank") == {}
    with pytest.raises(ValueError, match=r"no method is called 'ranks'; there are \[.*'soft_threshold_rank'"):
        second.take_loss_terms("ranks")
    with pytest.raises(ValueError, match="compressed before, by soft_threshold_rank"):
        second.prepare()
    with pytest.raises(PlanError, match="does not begin with"):
        second.apply_plan(CompressionPlan("bert"))


def test_a_state_of_another_schema_or_method_is_refused() -> None:
    compressor = Compressor(tiny_bert(), [config()])
    compressor.prepare()
    state = compressor.state_dict()
    with pytest.raises(PlanError, match="schema 7"):
        compressor.load_state_dict({**state, "schema": 7})
    with pytest.raises(PlanError, match="methods"):
        compressor.load_state_dict({**state, "handles": {}})


def test_a_plan_with_an_unusable_configuration_is_refused() -> None:
    record = MethodRecord("soft_threshold_rank", "prepared", {"target_params": 7})
    with pytest.raises(PlanError, match=r"unusable configuration.*target_params=7"):
        Compressor(tiny_bert()).apply_plan(CompressionPlan("bert", (record,)))


def test_changed_settings_are_told_when_a_plan_is_taken_over() -> None:
    saved = Compressor(tiny_bert(), [config()])
    saved.prepare()
    now = Compressor(tiny_bert(), [config(target_params=0.6)])
    now.prepare()
    with pytest.warns(UserWarning, match=r"'target_params': \(0.5, 0.6\)"):
        now.apply_plan(saved.plan)
