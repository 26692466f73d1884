"""Teachers of every origin: where they come from, what is kept of them, and that nothing of a student reaches them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForTokenClassification, BertModel

from lightning_compress.deploy import attach_plan, save_pretrained
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.methods.distillation import DistillationConfig
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.methods.multi_exit import convert as convert_exits
from lightning_compress.methods.multi_exit import prepare as prepare_exits
from lightning_compress.methods.teacher import Teacher, check_same_task, load_teacher, snapshot
from lightning_compress.methods.width_slimming import WidthSlimmingConfig, prune
from lightning_compress.methods.width_slimming import prepare as prepare_widths
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.plan import CompressionPlan, MethodRecord
from tests.toys import ToyTexts, tiny_bert
from tests.toys_exits import EVERYBODY_OF_TWO


def ids() -> Tensor:
    return torch.stack([ToyTexts()[row]["input_ids"] for row in range(4)])


def said(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(ids())[0]


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_students_earlier_self_stays_what_it_was() -> None:
    student, teacher = tiny_bert(), Teacher("self")
    teacher.open(student)
    assert teacher.model is None
    teacher.settle(student)
    before = said(student)
    shaken(student)
    assert torch.equal(said(teacher.on(torch.device("cpu"))), before) and not torch.equal(
        said(student), before
    )


def test_a_teacher_rests_in_evaluation_and_learns_nothing() -> None:
    given = tiny_bert(hidden_dropout_prob=0.5).train()
    teacher = Teacher("module", given=given)
    teacher.open(tiny_bert())
    assert teacher.model is not None and teacher.model is not given and given.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    assert all(p.requires_grad for p in given.parameters())


@pytest.mark.parametrize("kind", [BertModel, BertForTokenClassification, BertForMaskedLM])
def test_a_folder_is_opened_with_the_students_kind_of_head(kind: Any, tmp_path: Path) -> None:
    saved = shaken(kind(tiny_bert().config)).eval()
    saved.save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path))
    teacher.open(kind(tiny_bert().config))
    assert type(teacher.model) is kind
    assert torch.equal(said(teacher.model), said(saved))


def test_a_folder_without_the_weights_of_the_head_is_refused(tmp_path: Path) -> None:
    BertModel(tiny_bert().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was not fine-tuned.*classifier.weight"):
        Teacher(str(tmp_path)).open(tiny_bert())


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' cannot be loaded \(there is no such folder\)"):
        load_teacher(str(tmp_path / "nowhere"))


def test_the_state_brings_the_earlier_self_back_bit_by_bit(tmp_path: Path) -> None:
    teacher = Teacher("self")
    teacher.settle(shaken(tiny_bert()))
    torch.save(teacher.state_dict(), tmp_path / "state.pt")
    again = Teacher("self")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), tiny_bert(seed=5))
    assert again.model is not None and teacher.model is not None
    assert torch.equal(said(again.model), said(teacher.model))


def test_a_state_from_before_the_snapshot_takes_it_back() -> None:
    teacher = Teacher("self")
    before = teacher.state_dict()
    teacher.settle(tiny_bert())
    teacher.load_state_dict(before, tiny_bert())
    assert teacher.model is None


def test_the_weights_of_a_teacher_from_elsewhere_are_not_in_the_state() -> None:
    teacher = Teacher("module", given=tiny_bert())
    teacher.open(tiny_bert())
    assert teacher.state_dict() == {"weights": None}


def test_a_snapshot_is_read_by_taps_of_its_own() -> None:
    student = tiny_bert()
    taps = LayerTaps.of(student)
    twin = snapshot(student)
    assert LayerTaps.on(twin) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    said(twin)
    assert taps.latest == {}
    own = LayerTaps.of(twin)
    said(twin)
    assert sorted(own.latest) == [-1, 0, 1] and taps.latest == {}


def test_a_teacher_must_agree_in_what_is_asked_for() -> None:
    other = tiny_bert(vocab_size=30, num_labels=3)
    for name, message in (
        ("vocab_size", "30 tokens in its vocabulary, the model 40"),
        ("num_labels", "3 labels"),
    ):
        with pytest.raises(ValueError, match=message):
            check_same_task("x", other, tiny_bert(), [name])
    check_same_task("x", other, tiny_bert(), ["model_type"])


def test_a_teacher_whose_labels_are_in_another_order_is_refused() -> None:
    teacher, student = tiny_bert(), tiny_bert()
    teacher.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    check_same_task("x", teacher, student)  # whose names say nothing
    student.config.id2label = {0: "positive", 1: "negative"}
    check_same_task("x", teacher, student, ["vocab_size"])
    with pytest.raises(ValueError, match=r"order \['negative', 'positive'\].*id2label"):
        check_same_task("x", teacher, student)
    student.config.id2label = {0: "negative", 1: "positive"}
    check_same_task("x", teacher, student)


@pytest.mark.parametrize("config", [ContributionTokenDroppingConfig, DistillationConfig])
def test_a_source_is_a_path_or_a_name_and_no_model(config: Any) -> None:
    assert config(teacher=Path("a") / "b").to_dict()["teacher"] == str(Path("a") / "b")
    with pytest.raises(TypeError, match=r"teacher is a BertForSequenceClassification.*teacher_model"):
        config(teacher=tiny_bert())


def test_two_teachers_are_refused_and_a_missing_one_is_asked_for() -> None:
    with pytest.raises(ValueError, match="two teachers"):
        Teacher("self", given=tiny_bert())
    with pytest.raises(ValueError, match=r"as Distillation\(teacher_model="):
        Teacher("module").open(tiny_bert())


def test_a_snapshot_is_as_narrow_as_the_model_was() -> None:
    student = tiny_bert(initializer_range=0.3)
    handle = prepare_widths(student, WidthSlimmingConfig(heads=2, ffn=32, start=0.0, end=0.5, ffn_multiple=1))
    wide = said(student)
    teacher = Teacher("self")
    teacher.settle(student)
    assert torch.equal(said(teacher.on(torch.device("cpu"))), wide)
    prune(handle, handle.plan.steps)
    narrow = said(student)
    assert not torch.allclose(narrow, wide, atol=1e-3)
    assert torch.equal(said(teacher.on(torch.device("cpu"))), wide)
    later = Teacher("self")
    later.settle(student)
    assert torch.equal(said(later.on(torch.device("cpu"))), narrow)
    again = Teacher("self")
    again.load_state_dict(later.state_dict(), student)
    assert torch.equal(said(again.on(torch.device("cpu"))), narrow)


def test_no_text_leaves_a_teacher_early(tmp_path: Path) -> None:
    student = tiny_bert(num_hidden_layers=3).eval()
    handle = prepare_exits(student, MultiExitConfig(threshold=EVERYBODY_OF_TWO))
    everyone = said(student)  # leaves after the first layer
    twin = snapshot(student)
    full = said(twin)
    assert not torch.allclose(full, everyone, atol=1e-3)
    assert torch.equal(said(student), everyone)
    structure = convert_exits(handle)
    assert torch.allclose(said(student), everyone, atol=1e-5)
    assert torch.allclose(said(snapshot(student)), full, atol=1e-5)
    attach_plan(student, CompressionPlan("bert", (MethodRecord("multi_exit", "converted", {}, structure),)))
    save_pretrained(student, tmp_path / "exits")
    teacher = Teacher(str(tmp_path / "exits"))
    teacher.open(tiny_bert())
    assert torch.allclose(said(teacher.on(torch.device("cpu"))), full, atol=1e-5)
