"""Taking heads, neurons and channels out of whole models: sliced equals zeroed, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import Ledger, dense_weight, get_module
from lightning_compress.nn.width_surgery import Widths, apply_widths, slice_heads, slice_neurons

CLASSIFIERS = [
    ("bert", "BertForSequenceClassification"),
    ("roberta", "RobertaForSequenceClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("electra", "ElectraForSequenceClassification"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("llama", "LlamaForSequenceClassification"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Give every parameter, biases and norms too, a value of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def columns(model: nn.Module, layer: int, role: str) -> Tensor:
    """The weight ``[out, in]`` of the layer's linear with this role, as a view."""
    slot = next(slot for slot in describe(model).layers[layer].linears if slot.role == role)
    return dense_weight(get_module(model, slot.path))


@torch.no_grad()
def zero_heads(model: nn.Module, layer: int, dropped: list[int]) -> None:
    """Cut what the heads (all query heads of a key-value group) say off, by zeros in the output's columns."""
    anatomy = describe(model).layers[layer]
    queries = anatomy.num_heads // anatomy.num_key_value_heads
    for head in range(anatomy.num_heads):
        if head // queries in dropped:
            start = head * anatomy.head_dim
            columns(model, layer, "attention_output")[:, start : start + anatomy.head_dim] = 0.0


@torch.no_grad()
def zero_neurons(model: nn.Module, layer: int, dropped: list[int]) -> None:
    for neuron in dropped:
        columns(model, layer, "ffn_out")[:, neuron] = 0.0


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_sliced_heads_are_zeroed_heads(tiny, model_type, name) -> None:
    model = lively(tiny(model_type, name, num_labels=3))
    groups = describe(model).layers[0].num_key_value_heads
    keep = [1] if groups == 2 else [0, 3]
    zero_heads(model, 1, [head for head in range(groups) if head not in keep])
    expected = logits(model)
    slice_heads(model, 1, keep)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    first, second = describe(model).layers
    assert (first.num_heads, second.num_heads, second.num_key_value_heads) == (4, 2, len(keep))
    assert second.head_dim == 8


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_sliced_neurons_are_zeroed_neurons(tiny, model_type, name) -> None:
    model, keep = lively(tiny(model_type, name, num_labels=3)), [0, 3, 7, 20, 46]
    zero_neurons(model, 0, [neuron for neuron in range(48) if neuron not in keep])
    expected = logits(model)
    slice_neurons(model, 0, keep)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert [layer.intermediate_size for layer in describe(model).layers] == [5, 48]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_all_layers_may_keep_different_widths(tiny, model_type, name, attention) -> None:
    model = lively(tiny(model_type, name, num_labels=3))
    model.config._attn_implementation = attention
    zero_heads(model, 0, [1])
    zero_neurons(model, 0, [2, 5])
    zero_neurons(model, 1, list(range(1, 48)))
    expected = logits(model)
    groups = describe(model).layers[0].num_key_value_heads
    heads = tuple(head for head in range(groups) if head != 1)
    neurons = tuple(neuron for neuron in range(48) if neuron not in (2, 5))
    apply_widths(model, Widths(heads=(heads, None), neurons=(neurons, (0,))), Ledger(model))
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_full_width_is_the_identity_to_the_last_bit(tiny, model_type, name) -> None:
    model = lively(tiny(model_type, name, num_labels=3))
    expected, groups = logits(model), describe(model).layers[0].num_key_value_heads
    apply_widths(model, Widths((tuple(range(groups)),) * 2, (tuple(range(48)),) * 2), Ledger(model))
    assert torch.equal(logits(model), expected)
    apply_widths(model, Widths.full(2), Ledger(model))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_a_sliced_model_still_trains(tiny, model_type, name) -> None:
    model = tiny(model_type, name, num_labels=3).train()
    apply_widths(model, Widths(((0,), (1,)), ((1, 2), None)), Ledger(model))
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
    inner = [p for slot in describe(model).linears for p in get_module(model, slot.path).parameters()]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in inner)


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_reverting_gives_the_shapes_and_head_counts_back(tiny, model_type, name) -> None:
    model = tiny(model_type, name, num_labels=3)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    before, weights = describe(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected, ledger = logits(model), Ledger(model)
    apply_widths(model, Widths(((1,), (0,)), ((1, 2), (3,))), ledger)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} != shapes
    ledger.revert()
    assert describe(model) == before
    model.load_state_dict(weights)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_the_family_s_own_head_counts_follow(tiny, model_type, name) -> None:
    model = tiny(model_type, name)
    slice_heads(model, 0, [1])
    layer = describe(model).layers[0]
    attention = get_module(model, layer.attention)
    heads = 2 if model_type == "llama" else 1
    assert [getattr(attention, name) for name in layer.head_count_attributes] == [heads] * len(
        layer.head_count_attributes
    )
    assert [getattr(attention, name) for name in layer.head_width_attributes] == [8 * heads] * len(
        layer.head_width_attributes
    )


@pytest.mark.parametrize("keep", [[], [1, 0], [0, 0], [-1], [4]])
def test_heads_out_of_order_or_range_are_refused(tiny, keep) -> None:
    model = tiny("bert", "BertModel")
    with pytest.raises(ValueError, match=r"heads kept in layer 1 .* from 0 to 3"):
        slice_heads(model, 1, keep)


def test_nothing_is_changed_where_one_width_does_not_fit(tiny) -> None:
    model = tiny("bert", "BertModel")
    before = describe(model)
    with pytest.raises(ValueError, match=r"neurons kept in layer 1 are \[48\]"):
        apply_widths(model, Widths(((0,), (0,)), ((0,), (48,))), Ledger(model))
    with pytest.raises(ValueError, match="the model has 2 layers"):
        apply_widths(model, Widths.full(3), Ledger(model))
    assert describe(model) == before


def test_layers_without_heads_or_ffn_say_so(tiny) -> None:
    model = tiny("mamba", "MambaModel")
    with pytest.raises(ValueError, match="layer 0 of MambaModel has no attention heads"):
        slice_heads(model, 0, [0])
    with pytest.raises(ValueError, match="layer 0 of MambaModel has no FFN"):
        slice_neurons(model, 0, [0])
    with pytest.raises(ValueError, match="layer=2 is outside the model's layers, 0 to 1"):
        slice_neurons(model, 2, [0])
