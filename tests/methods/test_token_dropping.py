"""What both policies share: which models can drop tokens, and the guard of protected ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_compress.methods.token_dropping import (
    TokenGuard,
    check_can_drop,
    chosen_layers,
    encoder_path,
    install_policy,
    whole_numbers,
)
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.dropping import DroppingEncoder
from tests.toys import tiny_bert

SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model(name: str, **settings: Any) -> nn.Module:
    family = name.split("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("BertModel", {}, r"BertModel has no head.*AutoModelForSequenceClassification"),
        ("BertForTokenClassification", {}, "has a head that reads every token"),
        ("BertForQuestionAnswering", {}, "has a head that reads every token"),
        ("BertForMaskedLM", {}, "has a head that reads every token"),
        ("RobertaForTokenClassification", {}, "has a head that reads every token"),
        (
            "GPT2ForSequenceClassification",
            {"n_embd": 16, "n_layer": 2, "n_head": 4},
            "is not an encoder like BERT's",
        ),
        (
            "LlamaForSequenceClassification",
            {"num_key_value_heads": 2},
            "BERT, RoBERTa, DistilBERT and ELECTRA",
        ),
    ],
)
def test_a_model_whose_tokens_cannot_leave_is_refused_with_the_reason(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_can_drop(model(name, **settings))


def test_an_attention_implementation_that_takes_no_bias_is_refused_with_the_remedy() -> None:
    bert = tiny_bert()
    bert.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' takes no bias.*'sdpa'"):
        check_can_drop(bert)


def test_sequence_classifiers_of_the_four_families_are_taken() -> None:
    for name in ("Bert", "Roberta", "Electra"):
        assert check_can_drop(model(f"{name}ForSequenceClassification")).encoder is not None
    distilbert = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    assert check_can_drop(model("DistilBertForSequenceClassification", **distilbert)).encoder is not None


def test_layers_are_sorted_and_by_default_all() -> None:
    anatomy = describe(tiny_bert(num_hidden_layers=3))
    assert chosen_layers(anatomy, None) == (0, 1, 2) and chosen_layers(anatomy, [2, 0, 2]) == (0, 2)
    for bad in ([], [3], [-1]):
        with pytest.raises(ValueError, match="from 0 to 2, at least one"):
            chosen_layers(anatomy, bad)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.guarded_BT: Tensor | None = None


def test_a_guard_tells_the_policy_where_the_protected_ids_are() -> None:
    policy, embeddings = Plain(), nn.Embedding(10, 2)
    embeddings.register_forward_pre_hook(TokenGuard(policy, [3, 7]), with_kwargs=True)
    embeddings(torch.tensor([[3, 1, 7], [0, 2, 3]]))
    assert policy.guarded_BT.tolist() == [[True, False, True], [False, False, True]]
    with pytest.raises(ValueError, match=r"tokens \[3, 7\] are protected"):
        TokenGuard(policy, [3, 7])(embeddings, (), {"inputs_embeds": torch.zeros(1, 1, 2)})


def test_a_policy_is_put_around_the_familys_layers_and_can_be_taken_out_again() -> None:
    bert, policy = tiny_bert(), Plain()
    policy.linear = nn.Linear(2, 2)
    bert.double()
    layers = list(bert.bert.encoder.layer)
    ledger = install_policy(bert, policy, ())
    assert encoder_path(bert) == "bert.encoder" and isinstance(bert.bert.encoder, DroppingEncoder)
    assert [*bert.bert.encoder.layer] == layers and policy.linear.weight.dtype == torch.float64
    ledger.revert()
    assert type(bert.bert.encoder).__name__ == "BertEncoder"


def test_whole_numbers_of_a_plan_are_only_that() -> None:
    assert whole_numbers({"layers": [0, 2]}, "layers") == [0, 2]
    for bad in ((0, 2), [-1], [1.0], ["1"], [True], None, 3):
        with pytest.raises(TypeError, match="layers must be a list of whole numbers"):
            whole_numbers({"layers": bad}, "layers")
