"""Saved models that drop tokens: opened by transformers alone, saved again, cast, cut down and trained further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertTokenizer,
    PreTrainedModel,
    pipeline,
)

from lightning_compress.deploy import attach_plan, load, plan_of, save_pretrained
from lightning_compress.methods.contribution_token_dropping import convert
from lightning_compress.plan import CompressionPlan, MethodRecord, PlanError
from lightning_compress.runtime import packed_encoder
from tests.toys_contribution import FAMILIES, SEPARATOR, classifier, dropping, packed_pass, texts

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "plot"]


def deployed(family: str = "bert", **settings: Any) -> nn.Module:
    handle = dropping(classifier(family), protect_tokens=(SEPARATOR,), **settings)
    record = MethodRecord(handle.config.stem, "converted", handle.config.to_dict(), convert(handle))
    attach_plan(handle.model, CompressionPlan(handle.model.config.model_type, (record,)))
    return handle.model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_bits_and_keeps_the_same_tokens_after_loading(
    family: str, tmp_path: Path
) -> None:
    model = deployed(family)
    save_pretrained(model, tmp_path / "one")
    expected, kept = packed_pass(model, texts(family))
    assert len(kept[-1]) < int(texts(family)["attention_mask"].sum())
    opened: list[PreTrainedModel] = [
        load(tmp_path / "one"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "one"),
    ]
    opened[1].save_pretrained(tmp_path / "two")
    opened.append(load(tmp_path / "two"))
    for again in opened:
        logits, kept_again = packed_pass(again, texts(family))
        assert torch.equal(logits, expected) and kept_again == kept
        assert plan_of(again) == plan_of(model)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_text_classification_pipeline_answers_as_the_model_does(tmp_path: Path) -> None:
    model = deployed()
    folder = save_pretrained(model, tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    sentences = ["a good film", "a bad plot film a good good"]
    answers = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)(
        sentences, batch_size=2
    )
    with torch.no_grad():
        scores = model(**tokenizer(sentences, padding=True, return_tensors="pt")).logits.softmax(1)
    for answer, expected in zip(answers, scores, strict=True):
        found = {entry["label"]: entry["score"] for entry in answer}
        assert [found[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_it_can_be_loaded_in_half_precision(tmp_path: Path) -> None:
    save_pretrained(deployed(), tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert packed_pass(model, texts())[0].isfinite().all()


def test_the_base_model_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    save_pretrained(deployed(), tmp_path)
    with pytest.raises(PlanError, match=r"only its base model.*AutoModelForSequenceClassification"):
        AutoModel.from_pretrained(tmp_path)


def test_predictors_stay_frozen_and_the_rest_can_be_trained_after_loading(tmp_path: Path) -> None:
    save_pretrained(deployed(), tmp_path)
    for model in (load(tmp_path), AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen and frozen == {name for name, _ in model.named_parameters() if ".policy." in name}
        model.train()(**texts(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_even_texts_of_which_only_the_first_token_stays_give_every_weight_a_gradient(tmp_path: Path) -> None:
    model = deployed()
    packed_encoder(model).policy.scale.fill_(1e6)
    model.zero_grad()
    one = {name: value[:, :1] for name, value in texts().items()}
    model.train()(**one, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    "change", [{"layers": [7]}, {"predictor_width": 10**8}, {"predictor_width": 16}, {"extra": 1}], ids=str
)
def test_a_plan_that_was_tampered_with_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    save_pretrained(deployed(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["plan"]["methods"][0]["structure"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError):
        load(tmp_path)
