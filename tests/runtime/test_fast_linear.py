"""Engines against products of integers in float64, written out here."""

import threading

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.ops.block_quantize.reference import block_quantize
from lightning_compress.runtime.fast_linear import (
    CudaInt8Engine,
    DenseEngine,
    Int8Engine,
    ModuleEngine,
    PrepackedEngine,
    has_int8_kernels,
    has_prepacked_kernels,
    quantize_rows,
)

needs_int8 = pytest.mark.skipif(not has_int8_kernels(), reason="no products of 8-bit integers here")
needs_prepacked = pytest.mark.skipif(not has_prepacked_kernels(), reason="no prepacked weights here")
FORMATS = [
    BlockFormat(bits, block, factor)
    for bits in (8, 4)
    for block in ((1, 0), (0, 0))
    for factor in ("scale", "shift")
]


def weight(rows: int = 48, columns: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of a weight, their scales, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales_N = torch.rand(rows, generator=generator) / 100 + 0.001
    return weight_NK, scales_N, torch.randn(rows, generator=generator)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.1, 30, shape[-1])


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
@pytest.mark.parametrize("rows", [1, 2, 16, 37])
def test_integers_are_multiplied_exactly(held, rows):
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


@needs_int8
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_a_number_that_is_not_finite_is_not_taken_for_one_that_is(value):
    x_MK = inputs(3, 32)
    x_MK[1, 4] = value
    y_MN = Int8Engine(*weight())(x_MK)
    assert not y_MN[1].isfinite().any() and y_MN[[0, 2]].isfinite().all()
    assert not Int8Engine(*weight())(x_MK[1:2]).isfinite().any()


def engines(bias: bool = True) -> dict[str, object]:
    weight_NK, scales_N, bias_N = weight()
    real_NK, given = weight_NK * scales_N[:, None], bias_N if bias else None
    linear = nn.Linear(32, 48, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(real_NK)
        if bias:
            linear.bias.copy_(bias_N)
    made: dict[str, object] = {
        "fp32": DenseEngine(real_NK, given, torch.float32),
        "bf16 dense": DenseEngine(real_NK, given, torch.bfloat16),
        "cuda": CudaInt8Engine(weight_NK, scales_N, given),
        "module": ModuleEngine(linear),
    }
    if has_int8_kernels():
        made["int8"] = Int8Engine(weight_NK, scales_N, given)
    if has_prepacked_kernels():
        made["bf16"] = PrepackedEngine(real_NK, given)
    return made


@pytest.mark.parametrize("name", sorted(engines()))
@pytest.mark.parametrize("bias", [True, False])
def test_every_engine_computes_the_linear(name, bias):
    weight_NK, scales_N, bias_N = weight()
    x_MK = inputs(21, 32)
    expected = x_MK @ (weight_NK * scales_N[:, None]).T + (bias_N if bias else 0)
    with torch.no_grad():
        found = engines(bias)[name](x_MK)  # type: ignore[operator]
    tolerance = 1e-6 if name in ("fp32", "module") else 0.02
    assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("name", sorted(engines()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_inputs_is_that_of_outputs(name, dtype):
    engine = engines()[name]
    x = inputs(4, 32).div(10).to(dtype)
    with torch.no_grad():
        if name == "module":
            engine._module.to(dtype)  # type: ignore[attr-defined]
        found, expected = engine(x), engine(x.float()) if name != "module" else engine(x).float()  # type: ignore[operator]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("name", sorted(engines()))
@pytest.mark.parametrize("shape", [(32,), (1, 32), (0, 32), (2, 5, 32), (2, 0, 32)])
def test_any_dimensions_may_come_before(name, shape):
    engine, x = engines()[name], inputs(*shape)
    with torch.no_grad():
        found = engine(x)  # type: ignore[operator]
        assert found.shape == (*shape[:-1], 48)
        for index in range(shape[0] if len(shape) == 3 and shape[1] else 0):
            torch.testing.assert_close(found[index], engine(x[index]), rtol=0.02, atol=0.05)  # type: ignore[operator]


@pytest.mark.parametrize("name", sorted(engines()))
def test_inputs_need_not_be_contiguous(name):
    engine, x_MK = engines()[name], inputs(32, 9).T
    assert not x_MK.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(engine(x_MK), engine(x_MK.contiguous()))  # type: ignore[operator]


@pytest.mark.parametrize("name", sorted(engines()))
def test_inputs_stay_as_they_are(name):
    x_MK = inputs(9, 32)
    before = x_MK.clone()
    with torch.no_grad():
        engines()[name](x_MK)  # type: ignore[operator]
    assert torch.equal(x_MK, before)


@needs_int8
def test_rows_do_not_see_each_other():
    engine, x_MK = Int8Engine(*weight()), inputs(33, 32)
    torch.testing.assert_close(engine(x_MK), torch.cat([engine(row) for row in x_MK.split(1)]))


@pytest.mark.parametrize("name", sorted(set(engines()) - {"module"}))
def test_a_bias_that_was_trained_counts(name):
    weight_NK, scales_N, _ = weight()
    bias_N, x_MK = nn.Parameter(torch.zeros(48)), inputs(3, 32)
    built = {
        "int8": lambda: Int8Engine(weight_NK, scales_N, bias_N),
        "cuda": lambda: CudaInt8Engine(weight_NK, scales_N, bias_N),
        "bf16": lambda: PrepackedEngine(weight_NK * scales_N[:, None], bias_N),
        "bf16 dense": lambda: DenseEngine(weight_NK * scales_N[:, None], bias_N, torch.bfloat16),
        "fp32": lambda: DenseEngine(weight_NK * scales_N[:, None], bias_N, torch.float32),
    }[name]()
    with torch.no_grad():
        before = built(x_MK)
        bias_N.add_(64.0)
        torch.testing.assert_close(built(x_MK), before + 64, rtol=0.01, atol=0.2)


@pytest.mark.parametrize("name", sorted(engines()))
def test_threads_may_share_an_engine(name):
    engine, batches = engines()[name], [inputs(20 + index, 32, seed=index) for index in range(6)]
    with torch.no_grad():
        expected = [engine(batch) for batch in batches]  # type: ignore[operator]
    found: dict[int, Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = engine(batches[index])  # type: ignore[operator]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(6):
        torch.testing.assert_close(found[index], expected[index])


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
