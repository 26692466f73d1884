from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.factored_embedding import FactoredEmbedding
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import QuantizedEmbedding
from lightning_compress.nn.rounded_embedding import NarrowEmbedding, rounded_embedding, rounded_rows
from lightning_compress.nn.rounded_operators import Ramp
from lightning_compress.nn.width_gate import RankGate

IDS = torch.tensor([[3, 9, 3], [0, 10, 8]])
FORMATS = [
    BlockFormat(4),
    BlockFormat(4, (1, 3), "shift"),
    BlockFormat(8, (4, 4)),
    BlockFormat(3, (4, 0), "shift"),
    BlockFormat(8, (0, 0)),
]


def table() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(11, 8, padding_idx=0)


def full() -> Ramp:
    ramp = Ramp()
    ramp.set(1.0)
    return ramp


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_rows_are_those_of_the_whole_table_rounded(form: BlockFormat) -> None:
    whole = QuantizedEmbedding.from_embedding(table(), form)
    assert torch.equal(rounded_rows(table().weight, IDS, form), whole(IDS))


def test_columns_that_do_not_count_decide_no_factor() -> None:
    wide, kept = table(), torch.tensor([0, 2, 3, 7])
    wide.weight.data[:, 5] = 100.0
    small = nn.Embedding.from_pretrained(wide.weight.data[:, kept])
    for form in FORMATS:
        expected = QuantizedEmbedding.from_embedding(small, form)(IDS)
        assert torch.equal(rounded_rows(wide.weight, IDS, form, kept), expected)
        out = rounded_embedding(wide, IDS, wide(IDS), full(), kept, form=form)
        assert torch.equal(out[..., kept], expected) and not out[..., 5].any()


def test_gradients_are_those_of_the_exact_look_up_and_spare_the_padding() -> None:
    rounded, exact = table(), table()
    rounded_embedding(rounded, IDS, rounded(IDS), full(), None, form=FORMATS[0]).pow(2).sum().backward()
    assert rounded.weight.grad is not None and not rounded.weight.grad[0].any()
    held = rounded_rows(exact.weight, torch.arange(11), FORMATS[0])
    assert torch.allclose(rounded.weight.grad[3], 4 * held[3]) and torch.allclose(
        rounded.weight.grad[9], 2 * held[9]
    )


def test_a_table_of_gated_rank_is_looked_up_as_the_two_factors_that_it_will_be() -> None:
    whole, gate, form = table(), RankGate(8), BlockFormat(8)
    narrow = NarrowEmbedding(gate, form, form, form)
    with torch.no_grad():
        open_output = rounded_embedding(whole, IDS, whole(IDS), full(), None, form=form, narrow=narrow)
        assert torch.equal(open_output, rounded_rows(whole.weight, IDS, form))
        gate.close(whole.weight, 3)
        out = rounded_embedding(whole, IDS, gate(whole(IDS)), full(), None, form=form, narrow=narrow)
        whole.weight.copy_(gate(whole.weight))
        factored = FactoredEmbedding.of(whole, 3)
        looked_up = QuantizedEmbedding.from_embedding(factored.table, form)(IDS)
        expected = QuantizedLinear.from_linear(factored.projection, form, form)(looked_up)
    assert torch.equal(out, expected)


def test_the_factors_are_made_anew_only_where_something_changed() -> None:
    whole, gate, form = table(), RankGate(8), BlockFormat(8)
    narrow = NarrowEmbedding(gate, form, None, None)
    gate.close(whole.weight, 3)
    first = narrow.deployed(whole, None)
    assert narrow.deployed(whole, None) is first and isinstance(first[1], nn.Linear)  # type: ignore[index]
    with torch.no_grad():
        whole.weight.mul_(2.0)
    second = narrow.deployed(whole, None)
    assert second is not first
    gate.close(whole.weight, 2)
    assert narrow.deployed(whole, None) is not second
    assert copy.deepcopy(narrow)._built is None


def test_training_sees_rounded_rows_projected() -> None:
    whole, gate, form = table(), RankGate(8), BlockFormat(4)
    narrow = NarrowEmbedding(gate, form, form, form)
    gate.close(whole.weight, 3)
    out = rounded_embedding(whole, IDS, gate(whole(IDS)), full(), None, form=form, narrow=narrow)
    assert torch.allclose(out, gate(rounded_rows(whole.weight, IDS, form)), atol=1e-6)
    assert out.requires_grad
