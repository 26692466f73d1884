import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.runtime import linear_backends
from lightning_compress.runtime.int8_linear import has_int8_kernels
from lightning_compress.runtime.linear_backends import BACKENDS, build_engine, output_scales, refusal

ROW = BlockFormat()


def layer(
    weight: BlockFormat = ROW, inputs: BlockFormat | None = ROW, outputs: int = 64, bias: bool = True
) -> QuantizedLinear:
    torch.manual_seed(outputs)
    return QuantizedLinear.from_linear(nn.Linear(64, outputs, bias=bias), weight, inputs)


def able(name: str) -> bool:
    return name != "triton" and (name != "int8" or has_int8_kernels())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_computes_the_layer(name, bias):
    if not able(name):
        pytest.skip("no such kernels here")
    part, x = layer(bias=bias), torch.randn(9, 64)
    with torch.no_grad():
        expected = part(x)
        found = build_engine(name, part)(x)
    error = (found - expected).norm() / expected.norm()
    assert error < {"int8": 1e-5, "nf4": 0.15}.get(name, 0.02)


@pytest.mark.skipif(not has_int8_kernels(), reason="no products of 8-bit integers here")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("rows", [1, 0, 5])
@pytest.mark.parametrize("input_rows", [1, 0])
def test_integers_give_what_the_reference_gives(bits, factor, rows, input_rows):
    formats = BlockFormat(bits, (rows, 0), factor), BlockFormat(bits, (input_rows, 0), factor)
    part = layer(*formats, bias=factor == "scale")  # with shifts the reference rounds the bias too
    x = torch.randn(2, 7, 64) * torch.linspace(1, 20, 64)
    with torch.no_grad():
        torch.testing.assert_close(build_engine("int8", part)(x), part(x), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_layers_with_one_input_are_one_product(name):
    if not able(name):
        pytest.skip("no such kernels here")
    parts, x = [layer(outputs=size) for size in (64, 128, 64)], torch.randn(5, 64)
    with torch.no_grad():
        expected = torch.cat([build_engine(name, part)(x) for part in parts], dim=1)
        torch.testing.assert_close(build_engine(name, parts)(x), expected, rtol=0.01, atol=0.01)


def fused(part: QuantizedLinear) -> None:
    part.bias.grad = torch.ones(64)
    torch.optim.AdamW([part.bias], lr=4.0, weight_decay=0.0, fused=True).step()


def written(part: QuantizedLinear) -> None:
    part.bias.data.sub_(4.0)


def replaced(part: QuantizedLinear) -> None:
    part.bias = nn.Parameter(part.bias.detach() - 4.0)


@pytest.mark.parametrize("change", [fused, written, replaced])
@pytest.mark.parametrize("one_factor", [False, True])
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_bias_that_was_trained_counts_at_once_however_it_was_changed(name, rows, one_factor, change):
    if not able(name):
        pytest.skip("no such kernels here")
    parts, x = [layer() for _ in range(2)], torch.randn(rows, 64)
    alone = build_engine(name, parts[1], one_factor=one_factor)
    both = build_engine(name, parts, one_factor=one_factor)
    with torch.no_grad():
        before = alone(x), both(x)
    change(parts[1])
    with torch.no_grad():
        torch.testing.assert_close(alone(x), before[0] - 4.0, rtol=0.01, atol=0.03)
        first, second = both(x).split(64, dim=1)
        assert torch.equal(first, before[1][:, :64])
        torch.testing.assert_close(second, before[1][:, 64:] - 4.0, rtol=0.01, atol=0.03)


@pytest.mark.skipif(not has_int8_kernels(), reason="no products of 8-bit integers here")
def test_one_factor_for_all_rows_is_that_of_the_whole_input(monkeypatch):
    part, x = layer(), torch.randn(5, 64)
    x[0, 0] = 50.0
    whole = layer(inputs=BlockFormat(block=(0, 0)))
    with torch.no_grad():
        own = build_engine("int8", part, one_factor=True)(x)
        assert (own[1:] - part(x)[1:]).norm() > 0.01 * part(x)[1:].norm()
        monkeypatch.setattr(linear_backends, "has_dynamic_kernels", lambda: False)
        torch.testing.assert_close(
            build_engine("int8", part, one_factor=True)(x), whole(x), rtol=1e-5, atol=1e-5
        )


@pytest.mark.skipif(not has_int8_kernels(), reason="no products of 8-bit integers here")
def test_one_factor_keeps_the_bits_of_the_format():
    part, x = layer(inputs=BlockFormat(4)), torch.randn(5, 64)
    whole = layer(inputs=BlockFormat(4, (0, 0)))
    with torch.no_grad():
        torch.testing.assert_close(
            build_engine("int8", part, one_factor=True)(x), whole(x), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (layer(inputs=None), 'not quantised; use "bf16" or "fp32"'),
        (layer(inputs=BlockFormat(block=(1, 16))), r"blocks \(1, 16\)"),
        (layer(weight=BlockFormat(block=(16, 16))), "several factors for an output"),
    ],
)
def test_what_integers_cannot_do_is_refused(part, words):
    with pytest.raises(ValueError, match=words):
        build_engine("int8", part)
    assert refusal("fp32", part) is None


def test_sizes_that_bitsandbytes_cannot_do_are_refused():
    assert "multiples of 64" in str(refusal("nf4", layer(outputs=32)))
    assert refusal("bnb8", layer(outputs=32)) is None
    assert "multiples of 8" in str(refusal("bnb8", layer(outputs=12)))


def test_bitsandbytes_is_asked_for_where_it_is_not_there(monkeypatch):
    monkeypatch.setattr(linear_backends, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in str(refusal("bnb8", layer()))


def test_a_processor_without_kernels_is_told(monkeypatch):
    monkeypatch.setattr(linear_backends, "has_int8_kernels", lambda: False)
    assert "VNNI" in str(refusal("int8", layer()))


@pytest.mark.parametrize("block", [(1, 0), (1, 16), (16, 16), (0, 0)])
def test_triton_is_there_for_all_blocks_on_cuda_alone(block, monkeypatch):
    inputs = BlockFormat(block=(1, block[1]))
    assert "run on CUDA" in str(refusal("triton", layer(BlockFormat(block=block), inputs)))
    with FakeTensorMode():  # needs no GPU
        parts = [QuantizedLinear(64, 64, BlockFormat(block=block), inputs, device="cuda") for _ in range(3)]
        floating = QuantizedLinear(64, 64, BlockFormat(block=block), device="cuda")
    assert refusal("triton", parts[0]) is refusal("triton", parts) is None
    assert "not quantised" in str(refusal("triton", floating))
    monkeypatch.setattr(linear_backends, "find_spec", lambda name: None)
    assert "lightning-compress[triton]" in str(refusal("triton", parts[0]))


BLOCKS = [((1, 0), (1, 0)), ((1, 16), (1, 16)), ((16, 16), (1, 16)), ((5, 0), (1, 16)), ((0, 0), (1, 0))]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_blocks_of_several_layers_are_one_product_equal_to_the_references(blocks, bits, factor, monkeypatch):
    monkeypatch.setattr(
        linear_backends, "_triton_refusal", lambda parts: None
    )  # what runs is the operators' CPU form
    formats, x = [BlockFormat(bits, block, factor) for block in blocks], torch.randn(2, 5, 64)
    parts = [layer(*formats, outputs=size) for size in (64, 32, 7)]
    with torch.no_grad():
        expected = [part(x) for part in parts]
        assert torch.equal(build_engine("triton", parts[0])(x), expected[0])
        assert torch.equal(build_engine("triton", parts)(x), torch.cat(expected, dim=-1))
        assert build_engine("triton", parts)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("rows", [1, 37, 300])
def test_on_a_gpu_triton_computes_what_the_reference_does_on_the_processor(blocks, factor, rows):
    formats, x = [BlockFormat(8, block, factor) for block in blocks], torch.randn(rows, 64)
    parts = [layer(*formats, outputs=size) for size in (64, 32, 7)]
    with torch.no_grad():
        expected = torch.cat([part(x) for part in parts], dim=-1)
        engine = build_engine("triton", [part.cuda() for part in parts])
        assert torch.equal(engine(x.cuda()).cpu(), expected)


def test_layers_that_differ_cannot_be_joined():
    assert "cannot be joined" in str(refusal("fp32", [layer(), layer(inputs=None)]))
    assert "cannot be joined" in str(refusal("fp32", [layer(), layer(bias=False)]))
    assert "cannot be joined" in str(refusal("fp32", [layer(), layer(BlockFormat(block=(1, 16)))]))


def test_a_backend_that_is_unknown_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'int4' is not one of .*'nf4'"):
        build_engine("int4", layer())


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("rows", [1, 0, 5])
def test_scales_of_outputs_are_those_of_their_blocks(factor, rows):
    part = layer(BlockFormat(8, (rows, 0), factor), None)
    scales_N = output_scales(part)
    assert scales_N is not None
    torch.testing.assert_close(part.weight_int8() * scales_N[:, None], part.dequantized_weight())
    assert output_scales(layer(BlockFormat(block=(1, 16)))) is None
