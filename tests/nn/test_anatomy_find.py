import pytest
import torch
from torch import nn

from lightning_compress.nn.anatomy import describe, find_transformer

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Holder(nn.Module):
    """What a LightningModule looks like from here."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def test_the_model_held_as_an_attribute_is_found_with_its_path(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    assert find_transformer(Holder(loss=nn.BCELoss(), model=model)) == ("model", model)


def test_a_root_that_is_the_model_has_the_empty_path(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    assert find_transformer(model) == ("", model)


def test_the_outermost_of_nested_models_wins_even_under_an_earlier_second_name(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    holder = Holder(encoder=model.bert, model=model, again=model)
    assert find_transformer(holder) == ("model", model)


def test_a_compiled_model_is_found_inside_its_wrapper(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    assert find_transformer(Holder(model=torch.compile(model))) == ("model._orig_mod", model)
    assert find_transformer(torch.compile(model)) == ("_orig_mod", model)


@PEFT_WARNS
def test_a_peft_model_yields_the_inner_model_which_can_be_described(tiny):
    peft = pytest.importorskip("peft")
    model = tiny("bert", "BertForSequenceClassification")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    holder = Holder(model=peft.get_peft_model(model, config))
    path, found = find_transformer(holder)
    assert (path, found) == ("model.base_model.model", model)
    assert holder.get_submodule(path) is model
    assert describe(found).layers[0].num_heads == 4


def test_a_given_path_chooses_between_several_models(tiny):
    student, teacher = tiny("bert", "BertModel"), tiny("roberta", "RobertaModel")
    holder = Holder(student=student, teachers=Holder(first=teacher))
    assert find_transformer(holder, "student") == ("student", student)
    assert find_transformer(holder, "teachers") == ("teachers.first", teacher)


def test_several_models_are_listed_and_the_argument_to_choose_is_named(tiny):
    holder = Holder(student=tiny("bert", "BertModel"), teacher=tiny("bert", "BertModel"))
    with pytest.raises(
        ValueError, match=r"2 transformers models.*'student' \(BertModel\), 'teacher'.*module="
    ):
        find_transformer(holder)


def test_no_model_is_an_error_that_names_what_was_looked_for_and_what_is_there():
    with pytest.raises(
        ValueError, match=r"PreTrainedModel\) found in Holder.*net \(Linear\).*module= argument"
    ):
        find_transformer(Holder(net=nn.Linear(2, 2)))


def test_a_path_that_leads_nowhere_is_an_error_that_lists_the_children(tiny):
    with pytest.raises(ValueError, match=r"module='modle': no such sub-module in Holder.*children: model"):
        find_transformer(Holder(model=tiny("bert", "BertModel")), "modle")
