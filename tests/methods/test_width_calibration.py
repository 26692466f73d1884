"""A separate pass for importance, against gradients taken by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress.compressor import Compressor
from lightning_compress.methods import width_calibration
from lightning_compress.methods.distillation import DistillationConfig
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.methods.width_calibration import measure_importance
from lightning_compress.methods.width_config import WidthSlimmingConfig
from lightning_compress.methods.width_slimming import prepare
from lightning_compress.nn.importance import ImportanceMeter
from lightning_compress.nn.layer_taps import LayerTaps, exits_above
from lightning_compress.nn.multi_exit import exit_logits, install_exits
from tests.toys import tiny_bert
from tests.toys_slimming import batch, slimmed


def test_the_pass_sums_the_scores_of_its_batches() -> None:
    model = tiny_bert(hidden_dropout_prob=0.5).train()
    batches = [batch(4), {name: value.flip(0) for name, value in batch(6).items()}]
    meter, expected = ImportanceMeter(model), ImportanceMeter(model)
    measure_importance(model, meter, batches)
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()
    for one in batches:
        model.zero_grad()
        model(**one).loss.backward()
        expected.add()
    assert meter.num_passes == 2
    for layer, reference in zip(meter.layers, expected.layers, strict=True):
        assert torch.allclose(layer.heads_G, reference.heads_G)
        assert torch.allclose(layer.neurons_F, reference.neurons_F)


@pytest.mark.parametrize("per_exit", [False, True])
def test_all_exits_have_a_say(per_exit: bool) -> None:
    torch.manual_seed(0)
    model = tiny_bert(num_hidden_layers=3)
    install_exits(model, [0, 1], pooling="cls", pooler=False, dropout=0.1)
    LayerTaps.of(model)
    one, meter, expected = batch(), ImportanceMeter(model), ImportanceMeter(model)
    measure_importance(model, meter, [one], per_exit=per_exit)
    model.eval()
    loss = model(**one).loss
    early = [F.cross_entropy(logits_BC, one["labels"]) for logits_BC in exit_logits(model).values()]
    assert len(early) == 2
    for part in [*early, loss] if per_exit else [sum([*early, loss])]:
        model.zero_grad()
        part.backward(retain_graph=True)
        expected.add()
    assert meter.num_passes == (3 if per_exit else 1)
    for layer, reference in zip(meter.layers, expected.layers, strict=True):
        assert torch.allclose(layer.neurons_F, reference.neurons_F, rtol=1e-4)


@pytest.mark.parametrize("criterion", ["taylor", "group_taylor"])
def test_the_final_exit_alone_has_a_say_where_asked(criterion: Any) -> None:
    torch.manual_seed(0)
    model, plain = tiny_bert(num_hidden_layers=3), tiny_bert(num_hidden_layers=3)
    install_exits(model, [0, 1], pooling="cls", pooler=False, dropout=0.1)
    taps = LayerTaps.of(model)
    taps.equilibrium = exits_above([0, 1], num_layers=3)
    one = batch()
    final, whole, expected = (ImportanceMeter(m, criterion, hidden=True) for m in (model, model, plain))
    measure_importance(model, final, [one], importance_from="final_exit")
    assert taps.equilibrium == {0: 3, 1: 2, 2: 1}
    measure_importance(model, whole, [one])
    plain.eval()(**one).loss.backward()
    expected.add()
    for layer, reference in zip(final.layers, expected.layers, strict=True):
        assert torch.allclose(layer.heads_G, reference.heads_G, rtol=1e-4)
        assert torch.allclose(layer.neurons_F, reference.neurons_F, rtol=1e-4)
    assert not torch.allclose(whole.layers[0].heads_G, expected.layers[0].heads_G, rtol=0.05)


def taught(teacher: nn.Module, **settings: Any) -> Compressor:
    """A model with two exits, its teacher, and importance read off the official loss."""
    configs = [
        WidthSlimmingConfig(heads=2, ffn=0.5, calibration_batches=2, importance_loss="official", **settings),
        MultiExitConfig(dropout=0.0),
        DistillationConfig(teacher="module"),
    ]
    resources = {"distillation": {"teacher_model": teacher}}
    compressor = Compressor(tiny_bert(num_hidden_layers=3), configs, resources=resources)
    compressor.prepare()
    compressor.update(0.0)
    return compressor


def official_loss_by_hand(model: nn.Module, teacher: nn.Module, one: Any, exits: Any, layers: Any) -> Tensor:
    inputs = {name: value for name, value in one.items() if name != "labels"}
    with torch.no_grad():
        theirs = teacher.eval()(**inputs, output_hidden_states=True)
    own = model(**one, output_hidden_states=True)
    said = {**exit_logits(model), 2: own.logits}
    target_BC = theirs.logits.softmax(dim=-1)
    loss = torch.zeros(())
    for layer in exits:
        loss = loss + 0.9 * F.cross_entropy(said[layer], target_BC)
        loss = loss + 0.1 * F.cross_entropy(said[layer], one["labels"])
    for layer in layers:
        loss = loss + F.mse_loss(LayerTaps.of(model).latest[layer], theirs.hidden_states[layer + 1])
    return loss


@pytest.mark.parametrize(
    ("importance_from", "exits", "layers"),
    [("all_exits", (0, 1, 2), (-1, 0, 1, 2)), ("final_exit", (2,), (2,))],
)
def test_the_official_loss_asks_the_teacher(importance_from: Any, exits: Any, layers: Any) -> None:
    teacher, one = tiny_bert(seed=3, num_hidden_layers=3), batch()
    compressor = taught(teacher, importance_from=importance_from)
    handle: Any = compressor.handles["width_slimming"]
    model, expected = compressor.model, ImportanceMeter(compressor.model)
    measure_importance(model, handle.meter, [one], importance_from=importance_from, guide=handle.guide)
    model.eval()
    model.training = True  # nobody leaves early
    if importance_from == "final_exit":
        LayerTaps.of(model).equilibrium = None
    official_loss_by_hand(model, teacher, one, exits, layers).backward()
    expected.add()
    for layer, reference in zip(handle.meter.layers, expected.layers, strict=True):
        assert reference.heads_G.all()
        assert torch.allclose(layer.heads_G, reference.heads_G, rtol=1e-3)
        assert torch.allclose(layer.neurons_F, reference.neurons_F, rtol=1e-3)


def test_the_schedule_reads_importance_off_the_teacher_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = taught(tiny_bert(seed=3, num_hidden_layers=3), criterion="per_exit")
    handle: Any = compressor.handles["width_slimming"]
    guides: list[Any] = []
    measure = width_calibration.measure_importance
    monkeypatch.setattr(
        width_calibration,
        "measure_importance",
        lambda *args, **settings: (guides.append(settings["guide"]), measure(*args, **settings)),
    )
    compressor.model.train()
    compressor.model(**batch())
    handle.end_pass()
    compressor.update(0.99)
    assert guides == [compressor.handles["distillation"]] and handle.counts.heads_L == (2, 2, 2)


OFFICIAL = {"calibration_batches": 2, "importance_loss": "official", "heads": 2}


@pytest.mark.parametrize(
    ("company", "message"),
    [
        ([], "none takes part: add Distillation"),
        ([DistillationConfig(hidden_weight=0.0)], "hidden_weight=0.0 and logit_weight=1.0: give both"),
        (
            [DistillationConfig(start=0.35)],
            r"at 0.35 of training, but Distillation\(teacher='self'\) has one from",
        ),
    ],
)
def test_a_teacher_that_cannot_be_asked_is_refused_before_training(company: Any, message: str) -> None:
    compressor = Compressor(tiny_bert(), [WidthSlimmingConfig(**OFFICIAL), *company])
    with pytest.raises(ValueError, match=message):
        compressor.prepare()


def test_a_teacher_that_is_there_when_widths_fall_is_taken() -> None:
    compressor = Compressor(tiny_bert(), [WidthSlimmingConfig(**OFFICIAL), DistillationConfig(start=0.3)])
    compressor.prepare()
    compressor.model.train()
    compressor.update(0.2)
    compressor.model(**batch())
    compressor.step()
    compressor.update(0.4)  # the teacher was due between the two
    handle: Any = compressor.handles["width_slimming"]
    assert handle.counts.heads_L == (3, 3)
    assert compressor.handles["distillation"].phase == "joint"


def test_batches_without_labels_are_refused_with_the_remedy() -> None:
    model = tiny_bert()
    with pytest.raises(ValueError, match="calibration_batches=0"):
        measure_importance(model, ImportanceMeter(model), [{"input_ids": batch()["input_ids"]}])


@pytest.mark.parametrize("criterion", ["taylor", "group_taylor", "per_exit"])
def test_a_separate_pass_sees_the_sample_of_batches(criterion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    measure = width_calibration.measure_importance

    def spy(model: nn.Module, meter: ImportanceMeter, batches: Any, **settings: Any) -> None:
        seen.append((len(batches), settings))
        measure(model, meter, batches, **settings)
        assert not any(p.grad is not None and p.grad.any() for p in model.parameters())

    monkeypatch.setattr(width_calibration, "measure_importance", spy)
    handle = slimmed(10, heads=2, criterion=criterion, calibration_batches=3)
    assert (
        seen
        == [(3, {"importance_from": "all_exits", "guide": None, "per_exit": criterion == "per_exit"})] * 2
    )
    assert handle.recorder.batches == [] and handle.model.training
    assert not handle.model._forward_pre_hooks


def test_frozen_weights_are_refused_with_the_remedy() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].output.dense.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"1 weights that are frozen.*criterion='l0'"):
        prepare(model, WidthSlimmingConfig())
    prepare(model, WidthSlimmingConfig(criterion="l0"))


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize(
    ("wish", "frozen", "read"),
    [
        ({"ffn": 0.5}, "attention", "output.dense"),
        ({"heads": 2}, "intermediate", "attention.output.dense"),
        ({"embedding_rank": 12}, "encoder", None),
    ],
)
def test_weights_that_nobody_ranks_may_be_frozen(ranking: Any, wish: Any, frozen: str, read: Any) -> None:
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    handle = slimmed(10, model=model, calibration_batches=2, ranking=ranking, **wish)
    counts = handle.counts
    assert sum(counts.heads_L) == (4 if "heads" in wish else 8)
    assert sum(counts.neurons_L) == (64 if "ffn" in wish else 128)
    if read is not None:
        layer = model.bert.encoder.layer[1]
        layer.get_submodule(read).weight.requires_grad_(False)
        handle.ledger.revert()
        with pytest.raises(ValueError, match="weights that are frozen"):
            prepare(model, WidthSlimmingConfig(**wish))
