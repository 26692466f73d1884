"""Engines against products of integers in float64, written out here."""

import doctest

import pytest
import torch
from torch import Tensor

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.ops.block_quantize.reference import block_quantize
from lightning_compress.runtime import int8_linear
from lightning_compress.runtime.fbgemm_linear import FEW_ROWS, has_fbgemm
from lightning_compress.runtime.int8_linear import CudaInt8Engine, Int8Engine, has_int8_kernels, quantize_rows
from tests.runtime.toys_engines import inputs, weight

needs_int8 = pytest.mark.skipif(not has_int8_kernels(), reason="no products of 8-bit integers here")
FORMATS = [
    BlockFormat(bits, block, factor)
    for bits in (8, 4)
    for block in ((1, 0), (0, 0))
    for factor in ("scale", "shift")
]


def slow_product(
    x_MK: Tensor, weight_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None, held: BlockFormat
) -> Tensor:
    """Round to integers one row at a time, in float64, and multiply them as integers."""
    groups = [x_MK] if held.block[0] == 0 else list(x_MK.split(1))
    largest, results = 2 ** (held.bits - 1) - 1, []
    for group in groups:
        scale = group.abs().max().double() / largest
        if held.factor == "shift":
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        integers = (group.float() / scale.float()).double().round().long()
        results.append((integers @ weight_NK.long().T).double() * scale * scales_N.double())
    y_MN = torch.cat(results)
    return y_MN if bias_N is None else y_MN + bias_N


def test_numbers_worked_by_hand():
    if not has_int8_kernels():
        pytest.skip("no products of 8-bit integers here")
    # scales of the rows 2/127 and 1/127: integers (127, -64) (63.5 rounds to even) and (127, 127)
    x_MK = torch.tensor([[2.0, -1.0], [1.0, 1.0]])
    weight_NK = torch.tensor([[100, 0], [1, 2]], dtype=torch.int8)
    engine = Int8Engine(weight_NK, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 10.0]))
    expected = torch.tensor(
        [[12700 * 2 / 127, (127 - 128) * 0.5 * 2 / 127 + 10], [12700 / 127, 381 * 0.5 / 127 + 10]]
    )
    torch.testing.assert_close(engine(x_MK), expected)


@needs_int8
@pytest.mark.parametrize("held", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 37])
@pytest.mark.parametrize("fbgemm", [True, False])
def test_integers_are_multiplied_exactly(held, rows, fbgemm, monkeypatch):
    if not fbgemm:
        monkeypatch.setattr(int8_linear, "has_fbgemm", lambda: False)
    x_MK = inputs(rows, 32)
    torch.testing.assert_close(
        Int8Engine(*weight(), held)(x_MK).double(), slow_product(x_MK, *weight(), held), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("held", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_products_of_cuda_are_the_same_where_the_processor_computes_them(held, rows):
    x_MK = inputs(rows, 32)
    torch.testing.assert_close(
        CudaInt8Engine(*weight(), held)(x_MK).double(),
        slow_product(x_MK, *weight(), held),
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("held", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 37, 300])
def test_integer_tensor_cores_multiply_exactly(held, rows):
    x_MK = inputs(rows, 64)
    on_device = [part.cuda() for part in weight(96, 64)]
    found = CudaInt8Engine(*on_device, held)(x_MK.cuda()).cpu().double()  # type: ignore[arg-type]
    torch.testing.assert_close(found, slow_product(x_MK, *weight(96, 64), held), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("held", FORMATS, ids=str)
@pytest.mark.parametrize("one_factor", [True, False])
def test_rows_are_rounded_to_the_integers_of_the_reference(held, one_factor):
    x_MK = torch.cat([inputs(5, 7), torch.zeros(1, 7), torch.full((1, 7), -3.0)])
    integers, factors = block_quantize(x_MK, held.bits, 0 if one_factor else 1, 0, held.factor)
    found, scale = quantize_rows(x_MK, held, one_factor=one_factor)
    assert torch.equal(found, integers)
    expected = factors if held.factor == "scale" else torch.exp2(factors.float())
    torch.testing.assert_close(scale.expand_as(expected)[expected > 0], expected[expected > 0])


def test_huge_and_tiny_numbers_are_rounded_as_the_reference_does():
    x_MK = torch.tensor([[3e38, -1e38, 0.0], [1e-30, 5e-31, -1e-32]])
    for factor in ("scale", "shift"):
        integers, _ = block_quantize(x_MK, 8, 1, 0, factor)
        assert torch.equal(quantize_rows(x_MK, BlockFormat(factor=factor))[0], integers)


@needs_int8
@pytest.mark.parametrize("held", [BlockFormat(), BlockFormat(block=(0, 0))], ids=str)
def test_inputs_of_zeros_give_the_bias(held):
    weight_NK, scales_N, bias_N = weight()
    assert torch.equal(
        Int8Engine(weight_NK, scales_N, bias_N, held)(torch.zeros(3, 32)), bias_N.expand(3, 48)
    )


@pytest.mark.parametrize("engine", [pytest.param(Int8Engine, marks=needs_int8), CudaInt8Engine])
@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("one_factor", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [3, 20])
def test_a_row_with_a_number_that_is_not_finite_is_not_taken_for_one_that_is(
    engine, factor, one_factor, value, rows
):
    x_MK = inputs(rows, 32)
    x_MK[1, 4] = value
    built = engine(*weight(), BlockFormat(8, (0, 0) if one_factor else (1, 0), factor))
    y_MN = built(x_MK)
    spoiled = list(range(rows)) if one_factor else [1]
    assert not y_MN[spoiled].isfinite().any()
    assert one_factor or y_MN[[row for row in range(rows) if row != 1]].isfinite().all()
    assert not built(x_MK[1:2]).isfinite().any()


@pytest.mark.parametrize("engine", [pytest.param(Int8Engine, marks=needs_int8), CudaInt8Engine])
@pytest.mark.parametrize("held", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 20])
def test_bfloat16_is_rounded_once_or_on_the_way_where_rows_have_factors(engine, held, rows):
    most = FEW_ROWS if held.factor == "scale" and has_fbgemm() else 1
    is_rounded_on_the_way = engine is Int8Engine and held.block[0] and rows > most
    weight_NK, scales_N, bias_N = weight()
    low_MK, own = inputs(rows, 32).bfloat16(), (weight_NK, scales_N, 50 * bias_N)
    found = engine(*own, held)(low_MK)
    assert found.dtype == torch.bfloat16
    half = 1.001 * 2**-8  # of the last of 8 bits
    wanted = slow_product(low_MK.float(), *own, held)
    if is_rounded_on_the_way:  # product, factors and bias too
        within = 4 * half * (wanted.abs() + own[2].abs())
        assert ((found.double() - wanted).abs() <= within + 1e-4).all()
    else:
        torch.testing.assert_close(found.double(), wanted, rtol=half, atol=1e-4)


@needs_int8
def test_rows_do_not_see_each_other():
    engine, x_MK = Int8Engine(*weight()), inputs(33, 32)
    torch.testing.assert_close(engine(x_MK), torch.cat([engine(row) for row in x_MK.split(1)]))


@pytest.mark.parametrize("engine", [Int8Engine, CudaInt8Engine])
def test_inputs_in_other_blocks_are_refused(engine):
    with pytest.raises(ValueError, match=r"\(1, 16\).*block \(1, 0\)"):
        engine(*weight(), BlockFormat(block=(1, 16)))


def test_sizes_that_integer_tensor_cores_cannot_do_are_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        CudaInt8Engine(*weight(rows=12))


def test_a_processor_without_such_products_is_told_what_to_use(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(RuntimeError, match='"bf16" or "fp32"'):
        Int8Engine(*weight())
    assert doctest.testmod(int8_linear).failed == 0
