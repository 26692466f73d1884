"""The Triton kernel equals the reference: interpreted, compiled ahead of time, and on a GPU where there is one."""

import importlib
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from lightning_compress.ops import compact as package
from lightning_compress.ops.compact import compact, reference
from tests.ops.triton_harness import CAPABILITIES, assert_no_spilling, needs_triton

SCRIPT = "compact_triton_checks.py"
SHARED_MEMORY_LIMIT = 48 * 1024
"""Bytes that every GPU grants a program without being asked."""


@needs_triton
@pytest.mark.parametrize("check", ["sizes", "dtypes and strides", "many tiles and scans", "writes elsewhere"])
def test_the_interpreted_kernel_equals_the_reference(differences: dict[str, list[str]], check: str):
    assert differences[check] == []


@needs_triton
@CAPABILITIES
def test_the_kernel_compiles_without_a_gpu_and_without_spilling(compiled: dict[str, Any], capability: int):
    assert_no_spilling(compiled, capability, 8, SHARED_MEMORY_LIMIT)


@needs_triton
def test_rows_are_moved_sixteen_bytes_at_a_time(compiled: dict[str, Any]):
    narrow = [
        kernel["name"]
        for kernel in compiled["kernels"]
        if "ld.global.v4.b32" not in kernel["ptx"] or "st.global.v4.b32" not in kernel["ptx"]
    ]
    assert narrow == []


@needs_triton
def test_the_kernel_is_imported_when_a_gpu_first_asks_for_it(compiled: dict[str, Any]):
    assert compiled["unasked"] == []
    chosen = package._cuda_implementation.__wrapped__()
    assert chosen is importlib.import_module("lightning_compress.ops.compact.triton_kernel").compact


def test_without_triton_the_reference_runs_on_the_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(package, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert package._cuda_implementation.__wrapped__() is reference.compact


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 1000, 20_011])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_on_a_gpu_the_operator_equals_the_reference(dtype: torch.dtype, num_rows: int, ratio: float):
    hidden = torch.randn(num_rows, 384, device="cuda").to(dtype)
    keep = torch.rand(num_rows, device="cuda") < ratio
    inner = torch.randint(0, num_rows + 1, (100,), device="cuda").sort().values
    cu_seqlens = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), num_rows)])
    for offsets in (cu_seqlens, cu_seqlens.int()):
        for found, expected in zip(
            compact(hidden, keep, offsets), reference.compact(hidden, keep, offsets), strict=True
        ):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.gpu
def test_on_a_gpu_torch_finds_nothing_wrong_with_the_operator():
    hidden = torch.randn(37, 5, device="cuda", dtype=torch.float64, requires_grad=True)
    keep = torch.rand(37, device="cuda") < 0.5
    cu_seqlens = torch.tensor([0, 20, 20, 37], device="cuda")
    torch.library.opcheck(torch.ops.lightning_compress.compact.default, (hidden, keep, cu_seqlens))
    assert torch.autograd.gradcheck(lambda rows: compact(rows, keep, cu_seqlens)[0], hidden)
