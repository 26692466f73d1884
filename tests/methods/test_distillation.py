"""Distillation over training: when it begins, what it weighs, whom it asks, and that nothing of it is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertForQuestionAnswering, BertModel

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan, load, save_pretrained
from lightning_compress.losses.distillation import representation_loss
from lightning_compress.methods import distillation
from lightning_compress.methods.base import leaves_no_trace
from lightning_compress.methods.distillation import DistillationConfig, convert, prepare, restore, update
from lightning_compress.methods.multi_exit import MultiExitConfig
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.exit_router import ExitRouter
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.multi_exit import exit_logits
from lightning_compress.nn.soft_label_loss import prediction_distance, soft_cross_entropy
from lightning_compress.plan import PlanError
from lightning_compress.runtime import is_packed, pack, unpack
from tests.toys import ToyTexts, tiny_bert
from tests.toys_exits import EVERYBODY_OF_TWO

MASK_BT = (torch.arange(6) < torch.tensor([6, 3, 4, 1])[:, None]).long()


def texts(labels: bool = True) -> dict[str, Tensor]:
    rows = [ToyTexts()[i] for i in range(4)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    batch["attention_mask"] = MASK_BT
    return batch if labels else {name: batch[name] for name in ("input_ids", "attention_mask")}


def prepared(model: nn.Module, teacher_model: nn.Module | None = None, **settings: Any) -> Compressor:
    resources = {} if teacher_model is None else {"distillation": {"teacher_model": teacher_model}}
    teacher = {} if teacher_model is None else {"teacher": "module"}
    compressor = Compressor(model, [DistillationConfig(**{**teacher, **settings})], resources=resources)
    compressor.prepare()
    return compressor


def terms(compressor: Compressor) -> dict[str, float]:
    compressor.begin_step()
    compressor.model(**texts())
    return {name: float(term.detach()) for name, term in compressor.take_loss_terms().items()}


def states(model: nn.Module) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return model(**texts(labels=False), output_hidden_states=True).hidden_states


def slow_hidden(student: nn.Module, teacher: nn.Module) -> float:
    """``L_rep``, text by text and token by token."""
    total = 0.0
    for own_BTD, theirs_BTD in zip(states(student), states(teacher), strict=True):
        for row, length in enumerate(MASK_BT.sum(1).tolist()):
            apart = [float((own_BTD[row, t] - theirs_BTD[row, t]).square().mean()) for t in range(length)]
            total += sum(apart) / length / len(own_BTD)
    return total


def test_terms_are_those_of_the_specification() -> None:
    student, teacher = tiny_bert(), tiny_bert(seed=5)
    compressor = prepared(student, teacher, hidden_weight=2.0, logit_weight=3.0)
    compressor.update(0.0)
    got = terms(compressor)
    with torch.no_grad():
        expected = soft_cross_entropy(student(**texts()).logits, teacher(**texts()).logits)
    assert got["distillation/hidden"] == pytest.approx(2 * slow_hidden(student, teacher), rel=1e-5)
    assert got["distillation/logit"] == pytest.approx(3 * float(expected), rel=1e-5)


def test_padding_changes_nothing() -> None:
    compressor = prepared(tiny_bert(), tiny_bert(seed=5))
    compressor.update(0.0)
    before = terms(compressor)
    longer = {n: nn.functional.pad(v, (0, 4)) if v.dim() == 2 else v for n, v in texts().items()}
    compressor.begin_step()
    compressor.model(**longer)
    after = {name: float(term.detach()) for name, term in compressor.take_loss_terms().items()}
    assert after == pytest.approx(before, rel=1e-5)


def test_a_model_has_nothing_to_learn_from_itself_at_the_start_and_later_its_drift() -> None:
    student = tiny_bert()
    compressor = prepared(student, start=0.5, logit_weight=0.0)
    for progress in (0.0, 0.49):
        compressor.update(progress)
        assert compressor.handles["distillation"].phase == "waiting" and terms(compressor) == {}
    compressor.update(0.5)
    assert terms(compressor) == {"distillation/hidden": pytest.approx(0.0, abs=1e-9)}
    earlier = tiny_bert()
    with torch.no_grad():
        student.bert.embeddings.word_embeddings.weight.mul_(1.5)
    compressor.update(0.6)
    assert terms(compressor)["distillation/hidden"] == pytest.approx(slow_hidden(student, earlier), rel=1e-4)


def test_stages_begin_with_hidden_states_alone() -> None:
    student = tiny_bert()
    settings = {
        "start": 0.2,
        "stages": (0.4, 0.8),
        "hidden_first": 0.5,
        "task_weight": 0.25,
        "logit_weight": 2.0,
    }
    compressor = prepared(student, tiny_bert(seed=5), **settings)
    seen = []
    for progress in (0.1, 0.2, 0.4, 0.55, 0.6, 0.8, 0.85, 0.9, 1.0):
        compressor.update(progress)
        got = terms(compressor)
        seen.append(
            (compressor.handles["distillation"].phase, compressor.task_weight, got.get("distillation/logit"))
        )
    joint, alone = ("joint", 0.25, pytest.approx(seen[1][2])), ("hidden", 0.0, 0.0)
    assert seen == [("waiting", 1.0, None), joint, alone, alone, joint, alone, alone, joint, joint]
    assert seen[1][2] > 0.1


def test_the_weight_of_the_task_is_taken_once_and_not_from_an_objective_of_the_users_own() -> None:
    compressor = prepared(tiny_bert(), task_weight=0.5)
    assert compressor.task_weight == 1.0
    compressor.update(0.0)
    compressor.begin_step()
    assert (compressor.task_weight, compressor.take_task_weight(), compressor.take_task_weight()) == (
        0.5,
        0.5,
        1.0,
    )
    compressor.begin_step()
    compressor.model(**texts())
    compressor.take_loss_terms()
    assert compressor.take_task_weight() == 1.0
    assert Compressor(tiny_bert()).task_weight == 1.0


def test_a_deeper_teacher_of_another_vocabulary_of_states_teaches_predictions_only(tmp_path: Path) -> None:
    teacher = tiny_bert(seed=5, hidden_size=48, num_hidden_layers=3)
    teacher.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"48 wide, the model's 32.*hidden_weight=0"):
        prepared(tiny_bert(), teacher=str(tmp_path))
    compressor = prepared(tiny_bert(), teacher=str(tmp_path), hidden_weight=0.0)
    compressor.update(0.0)
    assert terms(compressor).keys() == {"distillation/logit"}
    shallow = prepared(tiny_bert(num_hidden_layers=3), tiny_bert(num_hidden_layers=2), hidden_weight=0.0)
    shallow.update(0.0)
    assert terms(shallow).keys() == {"distillation/logit"}


def test_exits_are_taught_by_the_exits_of_a_teacher_that_was_saved_packed(tmp_path: Path) -> None:
    deep, exits = {"num_hidden_layers": 3}, MultiExitConfig(threshold=EVERYBODY_OF_TWO, dropout=0.0)
    assistant = Compressor(tiny_bert(seed=5, **deep), [exits])
    assistant.prepare()
    attach_plan(assistant.model, assistant.convert())
    save_pretrained(assistant.model, tmp_path / "assistant")
    teacher = load(tmp_path / "assistant").eval()
    unpack(teacher)
    ExitRouter.on(teacher).detach()
    settings = {"teacher": str(tmp_path / "assistant"), "task_weight": 0.0, "temperature": 2.0}
    compressor = Compressor(tiny_bert(**deep), [DistillationConfig(**settings), exits])
    compressor.prepare()
    compressor.update(0.0)
    got = terms(compressor)
    theirs, own = said(teacher), said(compressor.model)
    expected = sum(float(soft_cross_entropy(own[layer], theirs[layer], 2.0)) for layer in range(3))
    assert got["distillation/logit"] == pytest.approx(expected, rel=1e-4)
    assert got["multi_exit/labels"] == got["multi_exit/final"] == 0.0


def said(model: nn.Module) -> dict[int, Tensor]:
    """Logits of each exit of a model of three layers."""
    LayerTaps.of(model)
    with torch.no_grad():
        return {2: model(**texts()).logits, **exit_logits(model)}


def test_the_tasks_weight_is_that_of_the_exits_labels_too() -> None:
    compressor = Compressor(
        tiny_bert(), [DistillationConfig(task_weight=0.5, start=0.5), MultiExitConfig(dropout=0.0)]
    )
    compressor.prepare()
    compressor.update(0.4)
    before = terms(compressor)
    compressor.update(0.5)
    after = terms(compressor)
    for name in ("multi_exit/labels", "multi_exit/final"):
        assert after[name] == pytest.approx(0.5 * before[name]) and before[name] > 0.1


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_predictions_are_compared_as_what_they_are(problem_type: Any) -> None:
    student, teacher = tiny_bert(num_labels=3), tiny_bert(seed=5, num_labels=3)
    student.config.problem_type = problem_type
    compressor = prepared(student, teacher, hidden_weight=0.0)
    compressor.update(0.0)
    compressor.begin_step()
    own = student(**texts(labels=False)).logits
    kind = "numbers" if problem_type == "regression" else "labels"
    with torch.no_grad():
        expected = prediction_distance(own, teacher(**texts(labels=False)).logits, kind)
    assert torch.allclose(compressor.take_loss_terms()["distillation/logit"], expected)


def test_a_single_number_is_a_regression() -> None:
    compressor = prepared(tiny_bert(num_labels=1), tiny_bert(seed=5, num_labels=1), hidden_weight=0.0)
    compressor.update(0.0)
    compressor.begin_step()
    own = compressor.model(**texts(labels=False)).logits
    with torch.no_grad():
        theirs = tiny_bert(seed=5, num_labels=1)(**texts(labels=False)).logits
    assert torch.allclose(compressor.take_loss_terms()["distillation/logit"], (own - theirs).square().mean())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_teacher_in_few_bits_says_nearly_the_same(bits: Any) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 64}
    compressor = prepared(tiny_bert(**wide), tiny_bert(seed=5, **wide), teacher_bits=bits)
    compressor.update(0.0)
    exact = prepared(tiny_bert(**wide), tiny_bert(seed=5, **wide))
    exact.update(0.0)
    got, expected = terms(compressor), terms(exact)
    assert got == pytest.approx(expected, rel=0.1) and got != expected


def test_hidden_states_alone_need_no_head() -> None:
    student = BertModel(tiny_bert().config)
    with pytest.raises(ValueError, match=r"BertModel has no predictions.*logit_weight=0"):
        prepare(student, DistillationConfig())
    with pytest.raises(ValueError, match="BertForQuestionAnswering has no predictions"):
        prepare(BertForQuestionAnswering(tiny_bert().config), DistillationConfig())
    compressor = prepared(student, BertModel(tiny_bert().config), logit_weight=0.0)
    compressor.update(0.0)
    compressor.begin_step()
    student(**texts(labels=False))
    assert compressor.take_loss_terms().keys() == {"distillation/hidden"}


def test_a_packed_student_learns_predictions_and_a_packed_teacher_is_unpacked() -> None:
    with pytest.raises(ValueError, match=r"unpack.*hidden_weight=0"):
        prepare(pack(tiny_bert()), DistillationConfig())
    given = pack(tiny_bert(seed=5))
    compressor = prepared(pack(tiny_bert()), given, hidden_weight=0.0)
    compressor.update(0.0)
    assert terms(compressor).keys() == {"distillation/logit"}
    reading = prepared(tiny_bert(), given)
    reading.update(0.0)
    assert terms(reading)["distillation/hidden"] == pytest.approx(
        slow_hidden(tiny_bert(), tiny_bert(seed=5)), rel=1e-4
    )
    assert is_packed(given)


def test_a_snapshot_of_learned_ranks_is_dense() -> None:
    settings = [DistillationConfig(start=0.5), SoftThresholdRankConfig(target_params=0.5, rank_multiple=4)]
    compressor = Compressor(tiny_bert(), settings)
    compressor.prepare()
    compressor.update(0.5)
    assert terms(compressor)["distillation/hidden"] == pytest.approx(0.0, abs=1e-6)
    assert [record.method for record in compressor.convert().methods] == ["soft_threshold_rank"]


def test_the_teacher_that_a_model_once_was_survives_in_the_state(tmp_path: Path) -> None:
    first = prepared(tiny_bert(), start=0.3)
    first.update(0.3)
    with torch.no_grad():
        first.model.bert.embeddings.word_embeddings.weight.mul_(1.5)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Compressor(tiny_bert(seed=9), [DistillationConfig(start=0.3)])
    second.apply_plan(first.plan)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.model.load_state_dict(first.model.state_dict())
    for compressor in (first, second):
        compressor.update(0.4)
    assert terms(first) == terms(second) and terms(first)["distillation/hidden"] > 0.0


def test_a_second_fit_keeps_the_first_snapshot() -> None:
    compressor = prepared(tiny_bert(), start=0.3)
    compressor.update(0.3)
    teacher = compressor.handles["distillation"].teacher.model
    for progress in (0.0, 0.5):
        compressor.update(progress)
    assert compressor.handles["distillation"].teacher.model is teacher


def test_a_teacher_that_must_be_given_again_is_asked_for_before_training() -> None:
    with pytest.raises(ValueError, match=r"as Distillation\(teacher_model="):
        Compressor(tiny_bert(), [DistillationConfig(teacher="module")]).prepare()
    with pytest.raises(ValueError, match="two teachers"):
        prepare(tiny_bert(), DistillationConfig(), teacher_model=tiny_bert())


def test_a_teacher_without_predictions_or_of_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match="3 labels, the model 2"):
        prepared(tiny_bert(), tiny_bert(num_labels=3))
    with pytest.raises(ValueError, match="predicts nothing"):
        prepared(tiny_bert(), BertModel(tiny_bert().config))
    assert prepared(tiny_bert(), BertModel(tiny_bert().config), logit_weight=0.0).is_prepared


def test_nothing_is_left_and_a_model_may_be_distilled_again(tmp_path: Path) -> None:
    model = tiny_bert()
    names = list(model.state_dict())
    compressor = prepared(model)
    compressor.update(0.0)
    assert list(model.state_dict()) == names
    assert compressor.plan.methods[0].stage == "prepared"
    plan = compressor.convert()
    assert leaves_no_trace(distillation) and plan.methods == () and compressor.is_converted
    assert LayerTaps.on(model) is None and not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )
    assert compressor.finished == {"distillation": DistillationConfig().to_dict()}
    with pytest.raises(ValueError, match="converted already"):
        compressor.convert()
    attach_plan(model, plan)
    save_pretrained(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        assert torch.equal(again(**texts()).logits, model.eval()(**texts()).logits)
    compressor.prepare()
    assert compressor.is_prepared and not compressor.is_converted


def test_a_plan_can_be_taken_back_and_forth() -> None:
    compressor = prepared(tiny_bert())
    compressor.update(0.0)
    plan, state = compressor.plan, compressor.state_dict()
    compressor.convert()
    compressor.apply_plan(plan)
    compressor.load_state_dict(state)
    compressor.update(0.1)
    assert terms(compressor)["distillation/hidden"] == pytest.approx(0.0, abs=1e-9)
    assert len(compressor.model._forward_hooks) == 1
    compressor.apply_plan(type(plan)("bert"))
    assert not compressor.model._forward_hooks and LayerTaps.on(compressor.model) is None


def test_there_is_nothing_to_restore() -> None:
    assert len(restore(tiny_bert(), {})) <= 1
    with pytest.raises(PlanError, match="leaves nothing"):
        restore(tiny_bert(), {"layers": [1]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 is not a number from 0"),
        ({"task_weight": float("nan")}, "task_weight=nan is not a number from 0"),
        ({"hidden_weight": 0.0, "logit_weight": 0.0}, "leave nothing to learn"),
        ({"temperature": 0.0}, "temperature=0.0 is not positive"),
        ({"temperature": float("inf")}, "temperature=inf is not positive and finite"),
        ({"start": 1.0}, r"start=1.0 is outside \[0, 1\)"),
        ({"start": 0.5, "stages": (0.4, 0.6)}, r"from start=0.5 to below 1"),
        ({"stages": (0.6, 0.4)}, "must be ascending"),
        ({"stages": ()}, "must be ascending"),
        ({"stages": (0.2, 1.0)}, "to below 1"),
        ({"hidden_first": 1.0}, r"hidden_first=1.0 is outside \[0, 1\)"),
        ({"hidden_first": 0.5, "hidden_weight": 0.0}, "hidden states alone"),
        ({"teacher_bits": 2}, "teacher_bits=2 is not 4, 8 or None"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**settings)


def test_representations_are_what_the_handle_compares() -> None:
    handle = prepare(tiny_bert(), DistillationConfig(teacher="module"), tiny_bert(seed=5))
    handle.open_resources()
    assert handle.lesson() is None
    update(handle, 0.0)
    handle.model(**texts())
    lesson = handle.lesson()
    assert lesson is not None and float(representation_loss(lesson.states).detach()) > 0.0
    assert convert(handle) == {} and handle.teacher.model is None
