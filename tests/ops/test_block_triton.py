"""The kernels of blocks equal the references: interpreted, compiled ahead of time, and on a GPU where there is one."""

import importlib
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_dequantize import reference as dequantizer
from lightning_compress.ops.block_matmul import block_matmul
from lightning_compress.ops.block_matmul import reference as multiplier
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.block_quantize import reference as quantizer
from tests.ops.triton_harness import CAPABILITIES, assert_no_spilling, needs_triton

SCRIPT = "block_triton_checks.py"
NAMES = ("block_quantize", "block_dequantize", "block_matmul")
SHARED_MEMORY_LIMIT = 99 * 1024
"""Bytes that a program can have on every GPU from sm_80 on, those of workstations included."""


@needs_triton
@pytest.mark.parametrize(
    "check",
    [
        "integers",
        "dtypes and strides",
        "edges of the range",
        "real numbers",
        "products",
        "long sums and large biases",
        "writes elsewhere",
    ],
)
def test_the_interpreted_kernels_equal_the_references_bit_for_bit(
    differences: dict[str, list[str]], check: str
):
    assert differences[check] == []


@needs_triton
@CAPABILITIES
def test_the_kernels_compile_without_a_gpu_and_without_spilling(compiled: dict[str, Any], capability: int):
    assert_no_spilling(compiled, capability, 9, SHARED_MEMORY_LIMIT)


@needs_triton
def test_products_run_on_integer_tensor_cores(compiled: dict[str, Any]):
    products = [kernel for kernel in compiled["kernels"] if "multiply" in kernel["name"]]
    assert len(products) == 15
    assert [kernel["name"] for kernel in products if ".s32.s8.s8" not in kernel["ptx"]] == []


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_imported_when_a_gpu_first_asks_for_it(compiled: dict[str, Any], name: str):
    assert compiled["unasked"] == []
    package = importlib.import_module(f"lightning_compress.ops.{name}")
    kernel = importlib.import_module(f"lightning_compress.ops.{name}.triton_kernel")
    assert package._cuda_implementation.__wrapped__() is getattr(kernel, name)


@pytest.mark.parametrize("name", NAMES)
def test_without_triton_the_references_run_on_the_gpu(monkeypatch: pytest.MonkeyPatch, name: str):
    package = importlib.import_module(f"lightning_compress.ops.{name}")
    monkeypatch.setattr(package, "find_spec", lambda asked: None if asked == "triton" else find_spec(asked))
    assert package._cuda_implementation.__wrapped__() is getattr(package.reference, name)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(1, 0), (0, 0), (32, 32), (1, 128), (128, 128), (3, 5)])
@pytest.mark.parametrize("shape", [(1, 1), (77, 384), (3, 130, 200)])
def test_on_a_gpu_integers_equal_those_on_the_cpu(
    shape: tuple[int, ...], block: tuple[int, int], dtype: torch.dtype, factor: str
):
    x = (torch.randn(shape) * torch.exp(3 * torch.randn(shape))).to(dtype)
    expected = quantizer.block_quantize(x, 8, *block, factor)
    found = block_quantize(x.cuda(), 8, block, factor)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)
    real = dequantizer.block_dequantize(*expected, *block)
    assert torch.equal(block_dequantize(*found, block).cpu(), real)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("guard_bits", [0, 6, 16])
@pytest.mark.parametrize("is_unsigned", [False, True])
@pytest.mark.parametrize(
    "blocks", [((1, 0), (1, 0)), ((1, 128), (128, 128)), ((1, 32), (32, 32)), ((1, 3), (0, 0))]
)
@pytest.mark.parametrize("shape", [(1, 5, 7), (77, 130, 384), (200, 60, 1600)])
def test_on_a_gpu_products_equal_those_on_the_cpu(
    shape: tuple[int, int, int], blocks: tuple, is_unsigned: bool, guard_bits: int, factor: str
):
    rows, outputs, depth = shape
    a, b, bias = torch.randn(2, rows, depth), torch.randn(2, outputs, depth), torch.randn(outputs)
    a_payload, a_factors = quantizer.block_quantize(a, 8, *blocks[0], factor)
    b_payload, b_factors = quantizer.block_quantize(b, 8, *blocks[1], factor)
    a_payload = a_payload.view(torch.uint8) if is_unsigned else a_payload
    operands = (a_payload, a_factors, b_payload, b_factors, bias)
    expected = multiplier.block_matmul(*operands, *blocks[0], *blocks[1], guard_bits)
    found = block_matmul(*(tensor.cuda() for tensor in operands), *blocks, factor, guard_bits)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_on_a_gpu_torch_finds_nothing_wrong_with_the_operators(factor: str):
    operators = torch.ops.lightning_compress
    x, bias = torch.randn(2, 5, 37, device="cuda"), torch.randn(5, device="cuda", requires_grad=True)
    torch.library.opcheck(operators.block_quantize.default, (x, 8, 2, 3, factor))
    payload, factors = block_quantize(x, 8, (2, 3), factor)
    torch.library.opcheck(operators.block_dequantize.default, (payload, factors, 2, 3))
    arguments = (payload, factors, payload, factors, bias, 2, 3, 2, 3, 6)
    torch.library.opcheck(operators.block_matmul.default, arguments)
