import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.deploy.float_form import round_by_rows, to_float_form
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.operator_formats import preset
from lightning_compress.nn.quantization_plan import quantize_model
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import QuantizedActivation, QuantizedEmbedding, QuantizedNorm
from tests.toys import tiny_bert

IDS = torch.arange(2, 18).view(2, 8)


def quantized(name: str = "w4a8", **settings: Any) -> Any:
    model = tiny_bert(initializer_range=0.3).eval()
    quantize_model(model, preset(name, **settings))  # type: ignore[arg-type]
    return model


def by_hand(model: nn.Module) -> Any:
    """The dense model with every weight as the integers have it."""
    plain, values = tiny_bert(initializer_range=0.3).eval(), {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            values[f"{name}.weight"] = module.dequantized_weight()
    assert len(values) == 15
    plain.load_state_dict({**plain.state_dict(), **values})
    return plain


@torch.no_grad()
@pytest.mark.parametrize("operators", [("linear", "embedding"), "all"])
@pytest.mark.parametrize("block", ["row", (1, 16), (8, 8)])
def test_weights_count_as_before_and_all_else_is_exact(block, operators):
    model = quantized(block=block, operators=operators)
    expected = by_hand(model)(IDS).logits
    rounded = model(IDS).logits
    to_float_form(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(rounded, expected, rtol=1e-6, atol=1e-6)
    kinds = (QuantizedLinear, QuantizedEmbedding, QuantizedNorm, QuantizedActivation)
    assert not any(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "silu", "relu"])
def test_every_activation_has_its_exact_form(function):
    x = torch.linspace(-4.0, 4.0, 41)
    exact = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU()}
    model = nn.Sequential(QuantizedActivation(function))
    to_float_form(model)
    torch.testing.assert_close(model(x), exact[function](x), rtol=0, atol=0)


def test_a_dense_model_stays_as_it_is():
    model = tiny_bert()
    before = dict(model.named_modules())
    to_float_form(model)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_rows_are_rounded_once_and_to_eight_bits():
    part = nn.Sequential(nn.Linear(6, 3), nn.Embedding(5, 6), nn.LayerNorm(6))
    dense = copy.deepcopy(part)
    round_by_rows(part)
    for index in (0, 1):
        weight = dense[index].weight.detach()
        step = weight.abs().amax(1, keepdim=True) / 127
        by_rows = (weight / step).round() * step
        torch.testing.assert_close(part[index].dequantized_weight(), by_rows, rtol=1e-6, atol=0)
    assert isinstance(part[2], nn.LayerNorm)


def test_what_has_one_factor_for_a_row_keeps_it_and_several_become_one():
    four, blocks = BlockFormat(4, factor="shift"), BlockFormat(4, (1, 2))
    kept, several = (QuantizedLinear.from_linear(nn.Linear(6, 3), held) for held in (four, blocks))
    table = QuantizedEmbedding.from_embedding(nn.Embedding(5, 6), BlockFormat(4, (0, 0)))
    part: Any = nn.Sequential(kept, several, table)
    before = several.dequantized_weight()
    round_by_rows(part)
    assert part[0] is kept
    assert part[2] is table
    assert part[1].weight_format == BlockFormat(8)
    step = before.abs().amax(1, keepdim=True) / 127
    assert (part[1].dequantized_weight() - before).abs().le(0.5001 * step).all()
    assert part[1].bias is several.bias
