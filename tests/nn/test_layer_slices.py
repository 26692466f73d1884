"""Heads and neurons of one layer: sliced equals zeroed, in every family."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.layer_slices import check_layer, cut_heads, cut_neurons
from lightning_compress.nn.surgery import Ledger, get_module
from tests.toys import CLASSIFIERS
from tests.toys_widths import lively, logits, zero_heads, zero_neurons


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_sliced_heads_are_zeroed_heads(tiny, model_type, name) -> None:
    model = lively(tiny(model_type, name, num_labels=3))
    groups = describe(model).layers[0].num_key_value_heads
    keep = [1] if groups == 2 else [0, 3]
    zero_heads(model, 1, [head for head in range(groups) if head not in keep])
    expected = logits(model)
    cut_heads(Ledger(model), describe(model).layers[1], keep)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    first, second = describe(model).layers
    assert (first.num_heads, second.num_heads, second.num_key_value_heads) == (4, 2, len(keep))
    assert second.head_dim == 8


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_sliced_neurons_are_zeroed_neurons(tiny, model_type, name) -> None:
    model, keep = lively(tiny(model_type, name, num_labels=3)), [0, 3, 7, 20, 46]
    zero_neurons(model, 0, [neuron for neuron in range(48) if neuron not in keep])
    expected = logits(model)
    cut_neurons(Ledger(model), describe(model).layers[0], keep)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert [layer.intermediate_size for layer in describe(model).layers] == [5, 48]


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_the_family_s_own_head_counts_follow(tiny, model_type, name) -> None:
    model = tiny(model_type, name)
    cut_heads(Ledger(model), describe(model).layers[0], [1])
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
    layer = describe(tiny("bert", "BertModel")).layers[1]
    with pytest.raises(ValueError, match=r"heads kept in layer 1 .* from 0 to 3"):
        check_layer(layer, heads=keep)


def test_layers_without_heads_or_ffn_say_so(tiny) -> None:
    layer = describe(tiny("mamba", "MambaModel")).layers[0]
    with pytest.raises(ValueError, match=r"layer 0, 'layers\.0', has no attention heads"):
        check_layer(layer, heads=[0])
    with pytest.raises(ValueError, match=r"layer 0, 'layers\.0', has no FFN"):
        check_layer(layer, neurons=[0])


def test_a_slice_can_be_noted_and_reverted(tiny) -> None:
    model = tiny("gpt2", "GPT2Model")
    before, ledger = describe(model), Ledger(model)
    cut_heads(ledger, before.layers[0], [1, 2])
    cut_neurons(ledger, before.layers[1], [5])
    assert describe(model) != before
    ledger.revert()
    assert describe(model) == before


def test_a_layer_may_keep_all_of_one_kind(tiny) -> None:
    layer = describe(tiny("bert", "BertModel")).layers[0]
    check_layer(layer)
    check_layer(layer, heads=range(4))
    with pytest.raises(ValueError, match=r"neurons kept in layer 0 are \[0, 0\]"):
        check_layer(layer, heads=[0], neurons=[0, 0])
