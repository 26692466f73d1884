"""Gradient saliency against an explicit Jacobian text by text, and a cache that knows texts by their content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_compress.nn.saliency import SaliencyCache, gradient_saliency
from tests.toys import tiny_bert

TEXTS = [[5, 6, 7, 8], [9, 10], [11], [12, 13, 14]]
LABELS = torch.tensor([0, 2, 1, 2])


def batch(texts: list[list[int]] = TEXTS, width: int = 0, left: bool = False) -> dict[str, Tensor]:
    side = "left" if left else "right"
    rows = [torch.tensor(text) for text in texts]
    if width:
        rows.append(torch.ones(width, dtype=torch.long))
    ids = pad_sequence(rows, batch_first=True, padding_side=side)[: len(texts)]
    ones = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": ones[: len(texts)]}


def lively(**settings: Any) -> nn.Module:
    return tiny_bert(initializer_range=0.3, num_labels=3, **settings).double()


def slow_saliency(model: nn.Module, text: list[int], chosen: int) -> Tensor:
    """From the whole Jacobian of the logits with respect to the embeddings' output, for one text without padding."""
    bert = model.bert
    embedded = bert.embeddings(torch.tensor([text])).detach()

    def logits(e: Tensor) -> Tensor:
        hidden = bert.encoder(e).last_hidden_state
        return model.classifier(bert.pooler(hidden))[0]

    jacobian = torch.autograd.functional.jacobian(logits, embedded)
    return (jacobian[chosen, 0] * embedded[0]).norm(dim=1)


def test_saliency_is_that_of_the_jacobian_and_zero_on_padding() -> None:
    model = lively().train()
    got = gradient_saliency(model, batch(width=6), LABELS)
    assert got.shape == (4, 6) and model.training
    for row, (text, label) in enumerate(zip(TEXTS, LABELS.tolist(), strict=True)):
        expected = slow_saliency(model.eval(), text, label)
        assert torch.allclose(got[row, : len(text)].double(), expected, rtol=1e-4, atol=1e-7)
        assert (got[row, len(text) :] == 0).all()


def test_a_text_without_gold_class_is_explained_by_the_prediction() -> None:
    model = lively()
    predicted = model.eval()(**batch()).logits.argmax(1)
    expected = gradient_saliency(model, batch(), predicted)
    assert torch.equal(gradient_saliency(model, batch(), None), expected)
    assert torch.equal(gradient_saliency(model, batch(), torch.full((4,), -100)), expected)
    assert not torch.equal(gradient_saliency(model, batch(), (predicted + 1) % 3), expected)


def test_several_gold_classes_are_explained_together() -> None:
    model = lively()
    both = torch.tensor([[1.0, 0.0, 1.0]]).expand(4, 3)
    first, last = (gradient_saliency(model, batch(), torch.full((4,), c)) for c in (0, 2))
    got = gradient_saliency(model, batch(), both)
    assert (got <= first + last + 1e-6).all() and not torch.allclose(got, first)
    one = torch.nn.functional.one_hot(LABELS, 3).double()
    assert torch.allclose(gradient_saliency(model, batch(), one), gradient_saliency(model, batch(), LABELS))


def test_regression_explains_its_output_whatever_the_label() -> None:
    model = tiny_bert(initializer_range=0.3, num_labels=1)
    one, other = (gradient_saliency(model, batch(), torch.full((4,), v)) for v in (0.3, 5.0))
    assert torch.equal(one, other) and (one.sum(1) > 0).all()


def test_the_teacher_is_left_as_it_was() -> None:
    model = lively().train()
    model.bert.pooler.eval()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with torch.no_grad():
        got = gradient_saliency(model, batch(), LABELS)
    assert not got.requires_grad and all(p.grad is None for p in model.parameters())
    assert model.training and not model.bert.pooler.training
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_half_precision_around_it_does_not_lose_small_gradients() -> None:
    model = lively().float()
    with torch.no_grad():
        model.classifier.weight.mul_(1e-4)
    exact = gradient_saliency(model, batch(), LABELS)
    with torch.autocast("cpu", torch.float16):
        got = gradient_saliency(model, batch(), LABELS)
    assert torch.equal(got, exact)


class Oracle:
    """Says of each row a function of its content, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], Any]] = []

    def __call__(self, inputs: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.asked += [
            (row[m.bool()].tolist(), None if labels is None else labels[i].item())
            for i, (row, m) in enumerate(zip(ids, mask, strict=True))
        ]
        return ids.float() * mask


def test_texts_are_found_again_shuffled_and_padded_otherwise() -> None:
    cache, oracle = SaliencyCache(), Oracle()
    first = cache.look_up(batch(), LABELS, oracle)
    order = [2, 0, 3, 1]
    again = cache.look_up(batch([TEXTS[i] for i in order], width=9), LABELS[order], oracle)
    assert len(oracle.asked) == len(cache) == 4
    assert torch.equal(again[:, :4], first[order]) and (again[:, 4:] == 0).all()
    assert torch.allclose(first.sum(1), torch.ones(4), atol=1e-3)
    assert torch.allclose(first[0], torch.tensor([5.0, 6.0, 7.0, 8.0]) / 26, atol=1e-3)


def test_only_new_rows_of_a_batch_are_explained() -> None:
    cache, oracle = SaliencyCache(), Oracle()
    cache.look_up(batch([[5, 6], [9, 9]]), None, oracle)
    oracle.asked.clear()
    cache.look_up(batch([[9, 9], [7, 7, 7], [5, 6]]), None, oracle)
    assert oracle.asked == [([7, 7, 7], None)]


def test_a_text_twice_in_a_batch_is_explained_once() -> None:
    cache, oracle = SaliencyCache(), Oracle()
    got = cache.look_up(batch([[5, 6], [5, 6]]), None, oracle)
    assert len(oracle.asked) == 1 and torch.equal(got[0], got[1])


def changed(name: str) -> tuple[dict[str, Tensor], Tensor | None]:
    inputs: dict[str, Tensor] = {**batch([[5, 6, 7]]), "token_type_ids": torch.tensor([[0, 0, 1]])}
    labels: Tensor | None = torch.tensor([1])
    if name == "token types":
        inputs["token_type_ids"] = torch.tensor([[0, 1, 1]])
    elif name == "label":
        labels = torch.tensor([0])
    elif name == "no label":
        labels = None
    elif name == "ids":
        inputs["input_ids"] = torch.tensor([[5, 7, 6]])
    elif name == "a shorter mask":
        inputs["attention_mask"] = torch.tensor([[1, 1, 0]])
    elif name == "padding on the left":
        inputs = {**batch([[5, 6, 7]], width=5, left=True), "token_type_ids": torch.tensor([[0, 0, 0, 0, 1]])}
    return inputs, labels


@pytest.mark.parametrize(
    "what", ["token types", "label", "no label", "ids", "a shorter mask", "padding on the left"]
)
def test_what_a_saliency_depends_on_is_part_of_what_a_text_is_known_by(what: str) -> None:
    cache, oracle = SaliencyCache(), Oracle()
    for name in ("same", what, "same", what):
        cache.look_up(*changed(name), oracle)
    assert len(cache) == len(oracle.asked) == 2


def test_the_state_holds_everything_that_was_said(tmp_path: Any) -> None:
    cache, oracle = SaliencyCache(), Oracle()
    first = cache.look_up(batch(), LABELS, oracle)
    torch.save(cache.state_dict(), tmp_path / "state.pt")
    again = SaliencyCache()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again.look_up(batch(), LABELS, oracle), first) and len(oracle.asked) == 4
    empty = SaliencyCache()
    empty.load_state_dict(SaliencyCache().state_dict())
    assert len(empty) == 0


def test_a_row_of_padding_alone_is_refused_by_number() -> None:
    inputs = {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.tensor([[1, 0, 0], [0, 0, 0]])}
    with pytest.raises(ValueError, match=r"rows \[1\] of the batch hold no token"):
        SaliencyCache().look_up(inputs, None, Oracle())
