"""What is measured of dropped tokens agrees with what the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_compress.nn.flops import count_flops
from lightning_compress.nn.kept_flops import count_kept_flops
from lightning_compress.report import measure_dropping
from lightning_compress.runtime import packed_encoder
from tests.toys import tiny_bert
from tests.toys_dropping import ToyTokenizer, dropping_bert, ragged_batch


def test_counts_fates_and_costs_agree_with_the_model() -> None:
    model, batch = dropping_bert(), ragged_batch([6, 2, 4], padded=8)
    found = measure_dropping(model, tiny_bert(), [batch])
    assert found is not None
    model(**batch)
    encoder = packed_encoder(model)
    assert encoder is not None
    kept_BL = torch.stack([segments.lengths_B for segments in encoder.latest], dim=1)
    assert found.record.layers == pytest.approx((kept_BL.sum(dim=0) / 12).tolist())
    assert [len(text.tokens) for text in found.record.texts] == [6, 2, 4]
    for text, kept_L in zip(found.record.texts, kept_BL.tolist(), strict=True):
        assert [sum(layers > layer for layers in text.layers) for layer in range(2)] == kept_L
        assert text.layers[0] == 2, "the first token never leaves"
    costs = count_kept_flops(model, kept_BL, torch.tensor([6, 2, 4]))
    assert found.flops == pytest.approx(float(costs.mean()))
    assert found.dense_flops == pytest.approx(count_flops(tiny_bert(), [6, 2, 4]).total / 3)


def test_labels_and_predictions_have_the_names_of_the_model() -> None:
    model, batch = dropping_bert(), ragged_batch([4, 5])
    model.config.id2label = {0: "no", 1: "yes"}
    found = measure_dropping(model, tiny_bert(), [batch])
    assert found is not None
    names = ["no", "yes"]
    assert [text.label for text in found.record.texts] == [names[label] for label in batch["labels"].tolist()]
    assert [text.prediction for text in found.record.texts] == [
        names[label] for label in model(**batch).logits.argmax(dim=-1).tolist()
    ]


def test_a_regression_shows_numbers_and_is_scored_by_correlation() -> None:
    batch = ragged_batch([4, 5, 6])
    batch["labels"] = torch.tensor([0.25, 1.5, 2.0])
    found = measure_dropping(dropping_bert(num_labels=1), tiny_bert(num_labels=1), [batch])
    assert found is not None and found.record.metric == "correlation"
    assert [text.label for text in found.record.texts] == ["0.25", "1.5", "2"]
    assert len(found.record.curve) == 5


def test_without_labels_there_is_no_curve_and_no_label() -> None:
    batch = ragged_batch([4, 5])
    del batch["labels"]
    found = measure_dropping(dropping_bert(), tiny_bert(), [batch])
    assert found is not None and found.record.curve == ()
    assert {text.label for text in found.record.texts} == {None}
    assert None not in {text.prediction for text in found.record.texts}


def test_measuring_leaves_the_mode_and_the_dial_as_they_were() -> None:
    model = dropping_bert().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert measure_dropping(model, tiny_bert(), [ragged_batch([4])]) is not None
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_drops_nothing_or_no_text_gives_nothing() -> None:
    assert measure_dropping(tiny_bert(), tiny_bert(), [ragged_batch([4])]) is None
    assert measure_dropping(dropping_bert(), tiny_bert(), []) is None


def test_short_texts_from_all_over_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_compress.report.dropping_measurement._SHORT", 3)
    batches = [ragged_batch([6] + [3] * 7, seed=seed) for seed in range(3)]
    found = measure_dropping(dropping_bert(), tiny_bert(), batches)
    assert found is not None
    assert [len(text.tokens) for text in found.record.texts] == [3] * 12
    ids = [" ".join(map(str, batch["input_ids"][row, :3].tolist())) for batch in batches for row in range(8)]
    places = [ids.index(" ".join(text.tokens)) for text in found.record.texts]
    assert places == sorted(places) and places[0] < 8 <= places[6] and places[-1] >= 16


@pytest.mark.parametrize(
    ("tokenizer", "pieces"),
    [
        (None, ["2", "7"]),
        (object(), ["2", "7"]),
        (ToyTokenizer(), ["<s>", "w7"]),
        (ToyTokenizer("Ġ"), ["<s>", "Ġé7"]),
    ],
    ids=["none", "unable", "wordpiece", "bytes"],
)
def test_pieces_are_the_tokenizers_with_bytes_read_as_text(tokenizer: Any, pieces: list[str]) -> None:
    batch = {"input_ids": torch.tensor([[2, 7]])}
    found = measure_dropping(dropping_bert(), tiny_bert(), [batch], tokenizer)
    assert found is not None
    assert list(found.record.texts[0].tokens) == pieces
