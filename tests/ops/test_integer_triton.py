"""The kernels of integers equal the references: interpreted, compiled ahead of time, and on a GPU if there is one."""

import importlib
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.integer_blocks import gelu_of_blocks, layernorm_of_blocks, softmax_of_blocks
from lightning_compress.ops.integer_gelu import FUNCTIONS, integer_gelu
from lightning_compress.ops.integer_layernorm import fixed_point_affine, integer_layernorm
from lightning_compress.ops.integer_softmax import integer_softmax, integer_softmax_by_row, softmax_factor
from tests.ops.triton_harness import CAPABILITIES, assert_no_spilling, needs_triton

SCRIPT = "integer_triton_checks.py"
SINGLE = ("integer_softmax", "integer_gelu", "integer_layernorm")
BLOCKS = ("softmax_of_blocks", "gelu_of_blocks", "layernorm_of_blocks")
SHARED_MEMORY_LIMIT = 48 * 1024
"""Bytes that every GPU grants a program without being asked."""


@needs_triton
@pytest.mark.parametrize(
    "check", ["aligned rows", "softmax", "activations", "norms", "blocks", "what kernels cannot do"]
)
def test_the_interpreted_kernels_equal_the_references_bit_for_bit(
    differences: dict[str, list[str]], check: str
):
    assert differences[check] == []


@needs_triton
@CAPABILITIES
def test_the_kernels_compile_without_a_gpu_and_without_spilling(compiled: dict[str, Any], capability: int):
    assert_no_spilling(compiled, capability, 8, SHARED_MEMORY_LIMIT)


@needs_triton
def test_kernels_are_imported_when_a_gpu_first_asks_for_them(compiled: dict[str, Any]):
    assert compiled["unasked"] == []
    for name in SINGLE:
        package = importlib.import_module(f"lightning_compress.ops.{name}")
        kernel = importlib.import_module(f"lightning_compress.ops.{name}.triton_kernel")
        assert package._cuda_implementation.__wrapped__() is getattr(kernel, name)
    package = importlib.import_module("lightning_compress.ops.integer_blocks")
    kernel = importlib.import_module("lightning_compress.ops.integer_blocks.triton_kernel")
    for name in BLOCKS:
        assert package._cuda_implementation.__wrapped__(name) is getattr(kernel, name)


@pytest.mark.parametrize("name", [*SINGLE, *BLOCKS])
def test_without_triton_the_references_run_on_the_gpu(monkeypatch: pytest.MonkeyPatch, name: str):
    folder = "integer_blocks" if name in BLOCKS else name
    package = importlib.import_module(f"lightning_compress.ops.{folder}")
    monkeypatch.setattr(package, "find_spec", lambda asked: None if asked == "triton" else find_spec(asked))
    arguments = (name,) if name in BLOCKS else ()
    assert package._cuda_implementation.__wrapped__(*arguments) is getattr(package.reference, name)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (77, 384), (500, 130), (3, 9000)])
def test_on_a_gpu_the_operators_equal_those_on_the_cpu(shape: tuple[int, int]):
    value = torch.randint(-(2**15) + 1, 2**15, shape, dtype=torch.int32)
    exponent = torch.randint(-30, 5, shape[:1], dtype=torch.int32)
    seen, affine = torch.rand(shape) < 0.7, fixed_point_affine(torch.randn(shape[1]), torch.randn(shape[1]))
    on_gpu = affine._replace(gamma_C=affine.gamma_C.cuda(), beta_C=affine.beta_C.cuda())
    rows = value.cuda(), exponent.cuda()
    found = [integer_softmax(*rows, softmax_factor(0.125), seen.cuda())]
    expected = [integer_softmax(value, exponent, softmax_factor(0.125), seen)]
    found += integer_softmax_by_row(*rows, softmax_factor(0.125), seen.cuda())
    expected += integer_softmax_by_row(value, exponent, softmax_factor(0.125), seen)
    for function in FUNCTIONS:
        found += integer_gelu(*rows, function)
        expected += integer_gelu(value, exponent, function)
    found += integer_layernorm(*rows, on_gpu, 1e-5)
    expected += integer_layernorm(value, exponent, affine, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("columns", [0, 3, 32, 128])
@pytest.mark.parametrize("shape", [(1, 1), (77, 384), (500, 130), (3, 9000)])
def test_on_a_gpu_blocks_equal_those_on_the_cpu(shape: tuple[int, int], columns: int, factor: str):
    x = torch.randn(shape) * torch.exp(torch.randn(shape[0], 1))
    blocks = block_quantize(x, 8, (1, columns), factor)
    on_gpu = tuple(tensor.cuda() for tensor in blocks)
    seen, affine = torch.rand(shape) < 0.7, fixed_point_affine(torch.randn(shape[1]), torch.randn(shape[1]))
    moved = affine._replace(gamma_C=affine.gamma_C.cuda(), beta_C=affine.beta_C.cuda())
    found = [softmax_of_blocks(*on_gpu, columns, 0.125, seen.cuda())]
    expected = [softmax_of_blocks(*blocks, columns, 0.125, seen)]
    for function in FUNCTIONS:
        found += gelu_of_blocks(*on_gpu, columns, function)
        expected += gelu_of_blocks(*blocks, columns, function)
    found += layernorm_of_blocks(*on_gpu, columns, moved)
    expected += layernorm_of_blocks(*blocks, columns, affine)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)
