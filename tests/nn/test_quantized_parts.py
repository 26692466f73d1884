import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_parts import (
    QuantizedActivation,
    QuantizedEmbedding,
    QuantizedNorm,
    activation_function,
    is_norm,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("block", [(1, 0), (0, 0), (3, 4), (1, 5)])
@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_looked_up_are_rows_of_the_rounded_table(block, factor, bits):
    table, ids = nn.Embedding(11, 13), torch.tensor([[0, 10, 3], [3, 9, 10]])
    ours = QuantizedEmbedding.from_embedding(table, BlockFormat(bits, block, factor))
    assert torch.equal(ours(ids), ours.dequantized_weight()[ids])
    unit = table.weight.abs().max() / (2 ** (bits - 1) - 1) * (2 if factor == "shift" else 1)
    assert (ours(ids) - table(ids)).abs().max() <= unit / 2 + 1e-6


def test_a_table_keeps_its_sizes_and_gives_the_dtype_that_the_model_was_cast_to():
    ours = QuantizedEmbedding.from_embedding(nn.Embedding(11, 6, padding_idx=1), BlockFormat(4)).bfloat16()
    assert (ours.num_embeddings, ours.embedding_dim, ours.padding_idx) == (11, 6, 1)
    assert ours(torch.tensor([3])).dtype == torch.bfloat16
    assert set(ours.state_dict()) == {"weight_payload", "weight_factors"}
    assert ours.storage_bytes == 11 * 3 + 11 * 4 and ours.kept_parameters == 66
    assert repr(ours) == "QuantizedEmbedding(11, 6, weight=BlockFormat(bits=4, block=(1, 0), factor='scale'))"


def test_a_blank_table_takes_the_state_over_bit_by_bit():
    ours = QuantizedEmbedding.from_embedding(nn.Embedding(5, 6), BlockFormat(4, (2, 3), "shift"))
    blank = QuantizedEmbedding.from_embedding(nn.Embedding(5, 6, device="meta"), ours.weight_format)
    assert all(buffer.is_meta for buffer in blank.buffers())
    blank.to_empty(device="cpu").load_state_dict(ours.state_dict())
    assert torch.equal(blank(torch.arange(5)), ours(torch.arange(5)))


def test_a_table_that_changes_when_it_is_read_is_refused():
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        QuantizedEmbedding.from_embedding(nn.Embedding(2, 2, max_norm=1.0), BlockFormat())


def random_norm(kind: str) -> nn.Module:
    norm = nn.LayerNorm(24, eps=1e-5) if kind == "layer" else LlamaRMSNorm(24, eps=1e-5)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.2)
    return norm


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_in_integers_is_near_the_exact_one_and_trains_like_it(kind):
    norm = random_norm(kind)
    ours, x = QuantizedNorm(copy.deepcopy(norm)), torch.randn(2, 3, 24, requires_grad=True)
    torch.testing.assert_close(ours(x), norm(x), rtol=0.0, atol=1e-3)
    assert not torch.equal(ours(x), norm(x))
    upstream = torch.randn(2, 3, 24)
    (expected,) = torch.autograd.grad(norm(x), x, upstream)
    ours(x).backward(upstream)
    torch.testing.assert_close(x.grad, expected)
    assert all(parameter.grad is not None for parameter in ours.parameters())
    assert ours.state_dict().keys() == norm.state_dict().keys()


def test_a_norm_in_integers_holds_the_very_parameters_of_the_norm():
    norm = random_norm("layer")
    ours = QuantizedNorm(norm)
    assert ours.weight is norm.weight and ours.bias is norm.bias
    assert QuantizedNorm(random_norm("rms")).bias is None
    assert repr(ours) == "QuantizedNorm(24, eps=1e-05, is_centred=True)"


def test_what_is_no_norm_is_refused():
    assert not is_norm(nn.LayerNorm(4, elementwise_affine=False)) and not is_norm(nn.RMSNorm(4))
    with pytest.raises(TypeError, match="Linear"):
        QuantizedNorm(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
        ("quick_gelu", None),
        ("tanh", None),
    ],
)
def test_activations_are_known_by_what_they_compute(name, function):
    module = ACT2FN[name]
    assert activation_function(module) == function
    if function is not None:
        x = 3 * torch.randn(5, 16)
        torch.testing.assert_close(QuantizedActivation(function)(x), module(x), rtol=0.0, atol=1e-3)


def test_activations_with_parameters_and_unknown_names_are_none_of_ours():
    assert activation_function(nn.PReLU()) is None
    with torch.device("meta"):
        assert activation_function(nn.GELU()) == "gelu"
    with pytest.raises(ValueError, match="'mish'"):
        QuantizedActivation("mish")


def test_the_gradient_of_an_activation_is_that_of_the_exact_one():
    x = torch.randn(4, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(nn.functional.silu(x).sum(), x)
    QuantizedActivation("silu")(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert repr(QuantizedActivation("silu")) == "QuantizedActivation(silu)"
