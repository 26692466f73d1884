"""Every engine computes the linear; those that round inputs have tests of their own besides."""

import threading

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.runtime.fast_linear import (
    DenseEngine,
    ModuleEngine,
    PrepackedEngine,
    has_prepacked_kernels,
)
from lightning_compress.runtime.int8_linear import CudaInt8Engine, Int8Engine, has_int8_kernels
from tests.runtime.toys_engines import inputs, weight


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
