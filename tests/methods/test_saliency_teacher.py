"""Teachers of every origin: what they explain, what is kept of them, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForTokenClassification, BertModel

from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig, prepare
from lightning_compress.methods.saliency_teacher import SaliencyTeacher, snapshot
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig, pin
from lightning_compress.methods.soft_threshold_rank import prepare as prepare_ranks
from lightning_compress.nn.saliency import gradient_saliency
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from tests.toys import tiny_bert

LIVELY = {"initializer_range": 0.3, "num_labels": 3}


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor([6, 3, 1])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}


def shares(model: nn.Module) -> Tensor:
    texts = {name: value for name, value in inputs().items() if name != "labels"}
    raw = gradient_saliency(model, texts, inputs()["labels"])
    return raw / raw.sum(1, keepdim=True)


def saved(folder: Path, **settings: Any) -> str:
    tiny_bert(seed=7, **{**LIVELY, **settings}).save_pretrained(folder)
    return str(folder)


def test_a_teacher_from_a_folder_explains_with_its_own_weights(tmp_path: Path) -> None:
    teacher = SaliencyTeacher(saved(tmp_path))
    student = tiny_bert(seed=0, **LIVELY)
    teacher.open(student)
    got = teacher.saliency(inputs())
    assert torch.allclose(got, shares(tiny_bert(seed=7, **LIVELY)), atol=1e-3)
    assert not torch.allclose(got, shares(student), atol=1e-2)
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_given_teacher_is_copied_and_left_as_it_was() -> None:
    given, student = tiny_bert(seed=7, **LIVELY).train(), tiny_bert(**LIVELY)
    teacher = SaliencyTeacher("module", given=given)
    teacher.open(student)
    assert torch.allclose(teacher.saliency(inputs()), shares(given), atol=1e-3)
    assert given.training and all(p.requires_grad for p in given.parameters())
    assert teacher.model is not given


def test_a_student_is_its_own_teacher_as_it_was_when_it_settled() -> None:
    student = tiny_bert(**LIVELY)
    teacher = SaliencyTeacher("self")
    teacher.open(student)
    assert teacher.model is None
    teacher.settle(student)
    expected = shares(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.allclose(teacher.saliency(inputs()), expected, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_few_bits_explain_nearly_the_same(bits: int) -> None:
    wide = {**LIVELY, "hidden_size": 64, "intermediate_size": 64}
    student = tiny_bert(**wide)
    teacher = SaliencyTeacher("self", bits)
    teacher.settle(student)
    assert torch.allclose(teacher.saliency(inputs()), shares(student), atol=0.02 if bits == 8 else 0.2)
    assert not torch.equal(teacher.saliency(inputs()), shares(student))
    assert type(student.bert.encoder.layer[0].intermediate.dense) is nn.Linear


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_state_brings_back_what_was_said_and_a_student_that_taught_itself(
    bits: int | None, tmp_path: Path
) -> None:
    wide = {**LIVELY, "hidden_size": 64, "intermediate_size": 64}
    student, teacher = tiny_bert(**wide), SaliencyTeacher("self", bits)
    teacher.settle(student)
    said = teacher.saliency(inputs())
    torch.save(teacher.state_dict(), tmp_path / "state.pt")
    again = SaliencyTeacher("self", bits)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), tiny_bert(seed=9, **wide))
    assert len(again.cache) == 3 and torch.equal(again.saliency(inputs()), said)
    other = {**inputs(), "labels": torch.tensor([1, 2, 0])}
    assert torch.equal(again.saliency(other), teacher.saliency(other)) and len(again.cache) == 6


def test_the_state_of_a_teacher_from_elsewhere_has_no_weights(tmp_path: Path) -> None:
    for source, given in ((saved(tmp_path), None), ("module", tiny_bert(**LIVELY))):
        teacher = SaliencyTeacher(source, given=given)
        teacher.open(tiny_bert(**LIVELY))
        teacher.saliency(inputs())
        assert teacher.state_dict()["weights"] is None
        again = SaliencyTeacher(source, given=given)
        again.load_state_dict(teacher.state_dict(), tiny_bert(**LIVELY))
        assert again.model is None and len(again.cache) == 3


def test_a_state_from_before_the_end_of_the_warm_up_takes_a_snapshot_back() -> None:
    student, teacher = tiny_bert(**LIVELY), SaliencyTeacher("self")
    before = teacher.state_dict()
    teacher.settle(student)
    teacher.load_state_dict(before, student)
    assert teacher.model is None


def test_a_snapshot_drops_nothing_and_nobody_hooks_into_it() -> None:
    student = tiny_bert(**LIVELY)
    calls: list[int] = []
    student.bert.register_forward_hook(lambda *_: calls.append(1))
    handle = prepare(student, ContributionTokenDroppingConfig(warmup=0.0, protect_tokens=(3,)))
    handle.policy.is_active = True
    twin = snapshot(student)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in twin.modules())
    assert not twin.bert.encoder.policy.is_active and handle.policy.is_active
    twin(**inputs())
    assert calls == [] and len(student.bert._forward_hooks) == 1


def test_a_snapshot_of_learned_ranks_is_dense_and_stays_what_it_was_in_later_phases() -> None:
    student = tiny_bert(**LIVELY)
    ranks = prepare_ranks(student, SoftThresholdRankConfig(target_params=0.5, rank_multiple=1))
    teacher = SaliencyTeacher("self")
    teacher.settle(student)
    expected, state = shares(student), teacher.state_dict()
    assert not any(isinstance(m, SoftThresholdLinear) for m in teacher.model.modules())
    pin(ranks)
    assert not torch.allclose(shares(student), expected, atol=1e-3)
    later = SaliencyTeacher("self")
    later.load_state_dict(state, student)
    assert torch.allclose(later.saliency(inputs()), expected, atol=1e-3)


def test_a_teacher_of_another_task_or_tokenizer_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    for settings, message in (
        ({"num_labels": 2}, "has 2 labels, the model 3"),
        ({"vocab_size": 30}, "has 30 tokens in its vocabulary, the model 40"),
    ):
        from_folder = SaliencyTeacher(saved(tmp_path / str(settings), **settings))
        for teacher in (from_folder, SaliencyTeacher("module", given=tiny_bert(**{**LIVELY, **settings}))):
            with pytest.raises(ValueError, match=message):
                teacher.open(tiny_bert(**LIVELY))


def test_a_teacher_that_was_not_fine_tuned_is_refused(tmp_path: Path) -> None:
    BertModel(tiny_bert(**LIVELY).config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was not fine-tuned.*classifier.weight"):
        SaliencyTeacher(str(tmp_path)).open(tiny_bert(**LIVELY))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' cannot be loaded \(there is no such folder\)"):
        SaliencyTeacher(str(tmp_path / "nowhere")).open(tiny_bert(**LIVELY))


@pytest.mark.parametrize("kind", [BertModel, BertForTokenClassification])
def test_a_given_model_that_predicts_no_class_per_text_is_refused(kind: type[nn.Module]) -> None:
    teacher = SaliencyTeacher("module", given=kind(tiny_bert(**LIVELY).config))
    with pytest.raises(ValueError, match="not one per text"):
        teacher.open(tiny_bert(**LIVELY))


def test_two_teachers_are_refused() -> None:
    with pytest.raises(ValueError, match="two teachers"):
        SaliencyTeacher("self", given=tiny_bert())


def test_a_teacher_that_is_not_given_again_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"give it again.*teacher_model="):
        SaliencyTeacher("module").open(tiny_bert(**LIVELY))


def test_a_model_called_without_ids_cannot_be_explained() -> None:
    teacher = SaliencyTeacher("self")
    teacher.settle(tiny_bert())
    with pytest.raises(ValueError, match="pass input_ids"):
        teacher.saliency({"inputs_embeds": torch.zeros(1, 2, 32)})


def test_a_copy_of_a_teacher_speaks_for_itself() -> None:
    teacher = SaliencyTeacher("self")
    teacher.settle(tiny_bert(**LIVELY))
    twin = copy.deepcopy(teacher)
    twin.saliency(inputs())
    assert len(twin.cache) == 3 and len(teacher.cache) == 0
