"""PyTorch's dynamic product against its definition, written out here in float64."""

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.runtime import dynamic_linear
from lightning_compress.runtime.dynamic_linear import DynamicEngine, has_dynamic_kernels
from lightning_compress.runtime.fbgemm_linear import prepack
from tests.runtime.toys_engines import inputs, weight

needs_kernels = pytest.mark.skipif(not has_dynamic_kernels(), reason="no dynamically quantised product here")


def slow_product(x_MK: Tensor) -> Tensor:
    """Round between the least and the largest, 0 among them, to 256 steps, and multiply integers."""
    weight_NK, scales_N, bias_N = weight()
    least, largest = min(x_MK.min().item(), 0.0), max(x_MK.max().item(), 0.0)
    scale = (largest - least) / 255
    zero = round(-least / scale)
    integers_MK = ((x_MK.double() / scale).round() + zero).clamp(0, 255).long() - zero
    return (integers_MK @ weight_NK.long().T).double() * scale * scales_N.double() + bias_N.double()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 8, 9, 16, 37])
def test_rounds_between_the_least_and_the_largest_of_all_rows(rows):
    x_MK = inputs(rows, 32)
    found, expected = DynamicEngine(*weight())(x_MK).double(), slow_product(x_MK)
    # an integer at a half may go to the other side
    assert (found - expected).norm() < 2e-3 * expected.norm()


@needs_kernels
@pytest.mark.parametrize("rows", [3, 20])
def test_a_bias_that_was_trained_counts(rows):
    weight_NK, scales_N, _ = weight()
    bias_N, x_MK = nn.Parameter(torch.zeros(48)), inputs(rows, 32)
    engine = DynamicEngine(weight_NK, scales_N, bias_N)
    before = engine(x_MK)
    with torch.no_grad():
        bias_N.add_(3.0)
    torch.testing.assert_close(engine(x_MK), before + 3)
    bias_N.data.add_(1.0)
    torch.testing.assert_close(engine(x_MK), before + 4)


@needs_kernels
def test_the_weight_is_laid_out_anew_only_for_another_bias(monkeypatch):
    weight_NK, scales_N, bias_N = weight()
    engine = DynamicEngine(weight_NK, scales_N, bias_N)
    packed: list[str] = []
    monkeypatch.setattr(
        dynamic_linear, "prepack", lambda name, *rest: packed.append(name) or prepack(name, *rest)
    )
    for rows in (3, 20):
        engine(inputs(rows, 32))
    assert packed == []
    bias_N.add_(1.0)
    for rows in (3, 20):
        engine(inputs(rows, 32))
    assert packed == ["fbgemm", "onednn"]


@needs_kernels
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_an_infinity_spoils_all_outputs_of_the_call(value, rows):
    x_MK = inputs(rows, 32)
    x_MK[rows // 2, 4] = value
    assert not DynamicEngine(*weight())(x_MK).isfinite().any()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_of_inputs_is_that_of_outputs(dtype):
    x = inputs(2, 3, 32).to(dtype)
    found = DynamicEngine(*weight())(x)
    assert found.dtype == dtype and found.shape == (2, 3, 48)
    torch.testing.assert_close(found, DynamicEngine(*weight())(x.float()).to(dtype))


def test_a_build_without_it_is_told(monkeypatch):
    monkeypatch.setattr(dynamic_linear, "has_dynamic_kernels", lambda: False)
    with pytest.raises(RuntimeError, match="no dynamically quantised product"):
        DynamicEngine(*weight())
