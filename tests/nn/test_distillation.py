"""Who learns from whom, and what both models say of the same texts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMultipleChoice

from lightning_compress.methods.bottleneck_token_dropping import BottleneckTokenDroppingConfig
from lightning_compress.methods.bottleneck_token_dropping import prepare as prepare_bottleneck
from lightning_compress.methods.contribution_token_dropping import ContributionTokenDroppingConfig
from lightning_compress.methods.contribution_token_dropping import prepare as prepare_contribution
from lightning_compress.nn.distillation import (
    Lesson,
    LogitsRecorder,
    compare,
    kept_tokens,
    layer_map,
    stop_recording,
)
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.multi_exit import exit_logits, install_exits
from lightning_compress.runtime import pack
from tests.toys import tiny_bert

MASK_BT = (torch.arange(6) < torch.tensor([6, 3])[:, None]).long()


def inputs() -> dict[str, Tensor]:
    ids_BT = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids_BT * MASK_BT, "attention_mask": MASK_BT}


def lesson(
    student: nn.Module, teacher: nn.Module, texts: dict[str, Tensor] | None = None, **settings: Any
) -> Lesson:
    recorder = LogitsRecorder().attach(student)
    LayerTaps.of(student)
    student(**(inputs() if texts is None else texts))
    count = [model.config.num_hidden_layers for model in (student, teacher)]
    guides = layer_map(*count) if count[0] <= count[1] else {}
    return compare(student, teacher.eval(), guides, **{"logits": recorder.logits, **settings})


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 3, [0, 1, 2]),
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (2, 5, [1, 4]),
        (3, 4, [0, 1, 3]),
        (1, 12, [11]),
    ],
)
def test_layers_are_paired_one_to_one_or_spread_evenly(
    student: int, teacher: int, expected: list[int]
) -> None:
    assert layer_map(student, teacher) == {-1: -1, **dict(enumerate(expected))}


def test_no_two_layers_have_one_guide() -> None:
    for teacher in range(1, 13):
        for student in range(1, teacher + 1):
            guides = layer_map(student, teacher)
            assert len(set(guides.values())) == student + 1 and guides[student - 1] == teacher - 1


def test_a_shallower_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 2 layers, the model 3.*hidden_weight=0"):
        layer_map(3, 2)


def test_a_model_compared_with_itself_agrees_everywhere() -> None:
    student = tiny_bert().eval()
    got = lesson(student, tiny_bert())
    assert len(got.states) == 3 and len(got.logits) == 1 and got.weight is None
    assert all(torch.equal(own, theirs) for own, theirs, _ in got.states)
    assert torch.equal(*got.logits[0])
    assert all(torch.equal(weight, MASK_BT.bool()) for _, _, weight in got.states)


def test_states_of_a_deeper_teacher_are_those_of_the_guides() -> None:
    teacher = tiny_bert(num_hidden_layers=4).eval()
    got = lesson(tiny_bert(), teacher)
    with torch.no_grad():
        expected = teacher(**inputs(), output_hidden_states=True).hidden_states
    assert [torch.equal(got.states[place][1], expected[depth]) for place, depth in enumerate((0, 2, 4))] == [
        True
    ] * 3


def test_only_the_student_is_in_the_graph_and_the_teacher_keeps_nothing() -> None:
    teacher = tiny_bert(seed=5)
    got = lesson(tiny_bert(), teacher)
    assert all(own.requires_grad and not theirs.requires_grad for own, theirs, _ in got.states)
    assert got.logits[0][0].requires_grad and not got.logits[0][1].requires_grad
    assert LayerTaps.of(teacher).latest == {}


def test_states_or_predictions_can_be_left_out() -> None:
    assert lesson(tiny_bert(), tiny_bert(), hidden=False).states == []
    assert lesson(tiny_bert(), tiny_bert(), logits=None).logits == []


def test_labels_of_the_student_are_kept_from_the_teacher() -> None:
    teacher, seen = tiny_bert(), []
    teacher.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    lesson(tiny_bert(), teacher, {**inputs(), "labels": torch.tensor([0, 1])})
    assert seen == [{"input_ids", "attention_mask"}]


def test_exits_learn_from_the_exits_of_their_guides_and_else_from_the_head() -> None:
    settings: Any = {"pooling": "cls", "pooler": False, "dropout": 0.0}
    student, teacher = tiny_bert(num_hidden_layers=3), tiny_bert(seed=5, num_hidden_layers=6)
    install_exits(student, [0, 1], **settings)
    plain = lesson(student, teacher)
    assert [torch.equal(theirs, plain.logits[-1][1]) for _, theirs in plain.logits] == [True] * 3
    install_exits(teacher, [1, 2], **settings)
    with torch.no_grad():
        LayerTaps.of(teacher)
        teacher(**inputs())
        expected = exit_logits(teacher)[1]
    got = lesson(student, teacher)
    assert torch.equal(got.logits[0][1], expected) and not torch.equal(expected, got.logits[-1][1])
    assert torch.equal(got.logits[1][1], got.logits[-1][1])  # no exit after layer 3
    own = exit_logits(student)
    assert [torch.equal(pair[0], own[layer]) for layer, pair in enumerate(got.logits[:2])] == [True] * 2


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1])])
def test_logits_are_found_in_every_form_of_output(return_dict: bool, labels: Tensor | None) -> None:
    model = tiny_bert().eval()
    recorder = LogitsRecorder().attach(model)
    expected = model(**inputs()).logits
    model(**inputs(), labels=labels, return_dict=return_dict)
    assert recorder.logits is not None and torch.equal(recorder.logits, expected)
    stop_recording(model)
    assert not model._forward_hooks


def test_a_copy_of_a_model_is_recorded_by_a_copy() -> None:
    model = tiny_bert()
    recorder = LogitsRecorder().attach(model)
    model(**inputs())
    twin, twins = copy.deepcopy((model, recorder))
    assert twins.logits is None
    before = recorder.logits
    twin(**inputs())
    assert twins.logits is not None and recorder.logits is before


@pytest.mark.parametrize("training", [True, False])
def test_tokens_that_were_dropped_count_no_more(training: bool) -> None:
    student = tiny_bert(initializer_range=0.5)
    handle = prepare_bottleneck(student, BottleneckTokenDroppingConfig(target_flops=0.5))
    handle.policy.threshold.fill_(10.0)
    handle.policy.noise = 0.0
    student.train(training)
    got = lesson(student, tiny_bert())
    embeddings, first, last = (weight.float() for _, _, weight in got.states)
    assert torch.equal(embeddings, MASK_BT.float())
    assert (last <= first).all() and (first <= embeddings).all() and last.sum() < embeddings.sum()
    assert last[:, 0].all()


def test_tokens_that_leave_softly_count_in_part() -> None:
    student = tiny_bert(initializer_range=0.5).train()
    handle = prepare_contribution(student, ContributionTokenDroppingConfig(threshold_init=1.0))
    lesson(student, tiny_bert())
    assert torch.equal(kept_tokens(student, 1, MASK_BT.bool()), MASK_BT.bool())
    handle.policy.is_active, handle.policy.slope = True, 10.0
    lesson(student, tiny_bert())
    weight_BT = kept_tokens(student, 1, MASK_BT.bool())
    assert not weight_BT.requires_grad and not weight_BT[MASK_BT == 0].any()
    assert ((weight_BT > 0) & (weight_BT < 1)).any()


def test_tokens_of_a_language_model_count_where_there_are_any(tiny: Any) -> None:
    student = tiny("gpt2", "GPT2LMHeadModel")
    got = lesson(student, tiny("gpt2", "GPT2LMHeadModel"))
    assert got.logits[0][0].shape == (2, 6, 50)
    assert got.weight is not None and torch.equal(got.weight, MASK_BT.bool())


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra", "llama"])
def test_every_family_can_be_read(family: str, tiny: Any) -> None:
    name = {"distilbert": "DistilBert", "roberta": "Roberta", "electra": "Electra", "llama": "Llama"}[family]
    student = tiny(family, f"{name}ForSequenceClassification")
    got = lesson(student, tiny(family, f"{name}ForSequenceClassification"))
    assert all(torch.equal(own, theirs) for own, theirs, _ in got.states) and torch.equal(*got.logits[0])
    assert len(got.states) == 3


def test_a_teacher_that_knows_no_token_types_is_not_given_any(tiny: Any) -> None:
    texts = {**inputs(), "token_type_ids": torch.zeros(2, 6, dtype=torch.long)}
    teacher = tiny("distilbert", "DistilBertForSequenceClassification")
    assert len(lesson(tiny_bert(num_hidden_layers=2), teacher, texts, hidden=False).logits) == 1


def test_choices_are_compared_one_by_one() -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(**small, num_attention_heads=4, max_position_embeddings=16)
    texts = {name: torch.stack([values, values.flip(0)], dim=1) for name, values in inputs().items()}
    got = lesson(BertForMultipleChoice(config), BertForMultipleChoice(config), texts)
    rows_BT = texts["attention_mask"].flatten(0, 1).bool()
    assert all(own.shape == (4, 6, 32) and torch.equal(weight, rows_BT) for own, _, weight in got.states)
    assert got.logits[0][0].shape == got.logits[0][1].shape == (2, 2) and got.weight is None


def test_what_cannot_be_compared_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 2\], its teacher of \[2, 3\].*logit_weight=0"):
        lesson(tiny_bert(), tiny_bert(num_labels=3))
    with pytest.raises(ValueError, match=r"shape \[2, 6, 32\], its teacher of \[2, 6, 16\].*hidden_weight=0"):
        lesson(tiny_bert(), tiny_bert(hidden_size=16))
    with pytest.raises(ValueError, match="unpack"):
        lesson(pack(tiny_bert()), tiny_bert())
    with pytest.raises(ValueError, match="pass input_ids"):
        lesson(tiny_bert(), tiny_bert(), {"inputs_embeds": torch.zeros(1, 2, 32)})
