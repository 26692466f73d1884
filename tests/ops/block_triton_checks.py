"""What is to be known about the kernels of blocks without a GPU; `test_block_triton.py` runs this and reads the answer.

    TRITON_INTERPRET=1 python tests/ops/block_triton_checks.py interpret
    python tests/ops/block_triton_checks.py compile

Processes of their own, because Triton decides at decoration time whether a kernel is interpreted.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.ops.triton_compile import Variant, main

PACKAGES = ("block_quantize", "block_dequantize", "block_matmul")
BLOCKS = ((1, 0), (0, 0), (2, 3), (1, 4), (0, 1), (32, 32))
FACTORS = ("scale", "shift")
PAIRS = (
    ((1, 0), (1, 0)),
    ((1, 4), (4, 4)),
    ((2, 3), (3, 3)),
    ((1, 32), (32, 32)),
    ((0, 0), (1, 5)),
    ((1, 3), (0, 0)),
)


def interpret() -> dict[str, list[str]]:
    """Compares the interpreted kernels with the references; returns what differs, by check."""
    return {
        "integers": _differing_integers(),
        "dtypes and strides": _differing_layouts(),
        "edges of the range": _differing_values(),
        "real numbers": _differing_numbers(),
        "products": _differing_products(),
        "long sums and large biases": _differing_sums(),
        "writes elsewhere": _writes_elsewhere(),
    }


def _differing_integers() -> list[str]:
    return [
        f"{shape}, {bits} bits, {block}, {factor}"
        for shape, bits, block, factor in itertools.product(((5, 7), (2, 3, 40)), (2, 8), BLOCKS, FACTORS)
        if not _quantizes(torch.randn(shape) * torch.exp(5 * torch.randn(shape)), bits, block, factor)
    ] + [
        f"{shape}, nothing"
        for shape in ((0, 3), (3, 0))
        if not _quantizes(torch.randn(shape), 8, (1, 2), "shift")
    ]


def _differing_layouts() -> list[str]:
    differing = []
    for dtype, factor in itertools.product((torch.bfloat16, torch.float16, torch.float64), FACTORS):
        x = torch.randn(9, 14).to(dtype)
        layouts = {"plain": x, "wide": x[:, 3:8], "transposed": x.t(), "every other": x[::2, ::2]}
        differing += [
            f"{dtype}, {layout}, {factor}"
            for layout, matrix in layouts.items()
            if not _quantizes(matrix, 8, (2, 3), factor)
        ]
    return differing


def _differing_values() -> list[str]:
    rows = {
        "zeros": [0.0, -0.0, 0.0],
        "denormal": [1e-45, -3e-40, 1e-39],
        "huge": [3.4e38, -1e20, 1.0],
        "halves": [127.0, 0.5, -2.5],
        "just above": [127.00001, 1.5, -63.5],
        "constant": [0.37, 0.37, -0.37],
        "smallest exponent": [2e-11, -1e-10, 2e-10],
    }
    return [
        f"{name}, {bits} bits, {factor}"
        for (name, row), bits, factor in itertools.product(rows.items(), (2, 3, 4, 8), FACTORS)
        if not _quantizes(torch.tensor([row]), bits, (1, 0), factor)
    ]


def _differing_numbers() -> list[str]:
    from lightning_compress.ops.block_dequantize import reference, triton_kernel
    from lightning_compress.ops.block_quantize import reference as quantizer

    differing = []
    for shape, block, factor in itertools.product(((5, 7), (2, 3, 5, 40), (0, 3), (3, 700)), BLOCKS, FACTORS):
        payload, factors = quantizer.block_quantize(torch.randn(shape), 8, *block, factor)
        for integers in (payload, payload.view(torch.uint8)):
            found = triton_kernel.block_dequantize(integers, factors, *block)
            if not torch.equal(found, reference.block_dequantize(integers, factors, *block)):
                differing.append(f"{shape}, {block}, {factor}, {integers.dtype}")
    return differing


def _differing_products() -> list[str]:
    cases = itertools.product((((5, 7, 9), True), ((20, 1, 33), False)), PAIRS, FACTORS)
    return [
        f"{shape}, {blocks}, {factor}, {'un' * is_unsigned}signed"
        for (shape, is_unsigned), blocks, factor in cases
        if not _multiplies(shape, blocks, factor, torch.randn(shape[1]), 6, is_unsigned)
    ]


def _differing_sums() -> list[str]:
    differing = []
    for blocks, size, guard_bits in itertools.product(PAIRS[1:3], (0.0, 1e12, 1e36), (0, 16)):
        if not _multiplies((2, 3, 11), blocks, "shift", torch.randn(3) * size, guard_bits):
            differing.append(f"bias around {size}, {guard_bits} guard bits, {blocks}")
    for depth, factor in itertools.product((1100, 2100), FACTORS):
        if not _multiplies((2, 3, depth), ((1, 0), (1, 0)), factor, None, 6):
            differing.append(f"{depth} columns, {factor}")
    return differing


def _writes_elsewhere() -> list[str]:
    """Runs into views within larger tensors, and looks around them."""
    from lightning_compress.ops.block_dequantize import triton_kernel as dequantizer
    from lightning_compress.ops.block_matmul import triton_kernel as multiplier
    from lightning_compress.ops.block_quantize import triton_kernel as quantizer

    touched, empty, made = [], torch.empty, []

    def inside(*shape: Any, **options: Any) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        room = torch.full((size.numel() + 256,), 77, dtype=options["dtype"])
        made.append((room, size.numel()))
        return room[128 : 128 + size.numel()].view(size)

    torch.empty = inside  # type: ignore[assignment]
    try:
        payload, factors = quantizer.block_quantize(torch.randn(2, 5, 7), 8, 2, 3, "shift")
        dequantizer.block_dequantize(payload, factors, 2, 3)
        multiplier.block_matmul(payload, factors, payload, factors, None, 2, 3, 2, 3, 6)
    finally:
        torch.empty = empty
    for room, size in made:
        if not bool((room[:128] == 77).all() and (room[128 + size :] == 77).all()):
            touched.append(f"{room.dtype}, {size}")
    return touched if len(made) == 4 else [f"{len(made)} outputs were made, not 4"]


def _quantizes(x: Tensor, bits: int, block: tuple[int, int], factor: str) -> bool:
    from lightning_compress.ops.block_quantize import reference, triton_kernel

    found = triton_kernel.block_quantize(x, bits, *block, factor)
    expected = reference.block_quantize(x, bits, *block, factor)
    return all(
        ours.dtype == theirs.dtype and ours.is_contiguous() and torch.equal(ours, theirs)
        for ours, theirs in zip(found, expected, strict=True)
    )


def _multiplies(
    shape: tuple[int, int, int],
    blocks: tuple[tuple[int, int], tuple[int, int]],
    factor: str,
    bias: Tensor | None,
    guard_bits: int,
    is_unsigned: bool = False,
) -> bool:
    from lightning_compress.ops.block_matmul import reference, triton_kernel
    from lightning_compress.ops.block_quantize.reference import block_quantize

    rows, outputs, depth = shape
    a, b = (
        torch.randn(2, size, depth) * torch.exp(2 * torch.randn(2, size, depth)) for size in (rows, outputs)
    )
    a_payload, a_factors = block_quantize(a, 8, *blocks[0], factor)
    b_payload, b_factors = block_quantize(b, 8, *blocks[1], factor)
    a_payload = a_payload.view(torch.uint8) if is_unsigned else a_payload
    arguments = (a_payload, a_factors, b_payload, b_factors, bias, *blocks[0], *blocks[1], guard_bits)
    found, expected = triton_kernel.block_matmul(*arguments), reference.block_matmul(*arguments)
    return found.is_contiguous() and torch.equal(found, expected)


def _variants() -> list[Variant]:
    """What is used, and what is most likely to spill."""
    from lightning_compress.ops.block_dequantize import triton_kernel as dequantizer
    from lightning_compress.ops.block_matmul import triton_kernel as multiplier
    from lightning_compress.ops.block_quantize import triton_kernel as quantizer

    def quantize(x: str, is_shift: bool, block: tuple[int, int]) -> Variant:
        pointers = {"x_ptr": f"*{x}", "payload_ptr": "*i8", "factor_ptr": "*i8" if is_shift else "*fp32"}
        constants = quantizer.integer_constants(8) | quantizer.tile_sizes(512, 384, *block)
        constants["IS_SHIFT"] = is_shift
        name = f"quantize {x} {is_shift} {block}"
        return Variant(name, quantizer.quantize_kernel, pointers, constants, aligned=("num_columns",))

    def multiply(edge: int, is_shift: bool, is_unsigned: bool, is_wide: bool) -> Variant:
        factor = "i8" if is_shift else "fp32"
        pointers = {"a_ptr": "*u8" if is_unsigned else "*i8", "a_factor_ptr": f"*{factor}", "b_ptr": "*i8"}
        pointers |= {"b_factor_ptr": f"*{factor}", "bias_ptr": "*fp32", "out_ptr": "*fp32"}
        constants = {
            "A_ROWS": 1,
            "B_ROWS": edge if edge <= 128 else 1,
            "A_IS_ONE": edge > 128,
            "B_IS_ONE": edge > 128,
        }
        constants |= {"GUARD_BITS": 6, "IS_SHIFT": is_shift, "IS_UNSIGNED": is_unsigned, "IS_WIDE": is_wide}
        constants |= {"HAS_BIAS": True} | multiplier.tile_sizes(512, 384, edge, is_shift)
        name = f"multiply {edge} {factor} {'un' * is_unsigned}signed {'wide' * is_wide}"
        return Variant(name, multiplier.matmul_kernel, pointers, constants, aligned=("depth", "edge"))

    numbers = {"payload_ptr": "*i8", "factor_ptr": "*i8", "out_ptr": "*fp32"}
    sizes = {"IS_SHIFT": True} | dequantizer.tile_sizes(384, 32, 32)
    return [
        quantize("bf16", False, (1, 128)),
        quantize("fp32", True, (1, 0)),
        quantize("fp32", True, (128, 128)),
        Variant("dequantize", dequantizer.dequantize_kernel, numbers, sizes, aligned=("num_columns",)),
        multiply(128, False, False, False),
        multiply(384, False, False, False),
        multiply(128, True, False, False),
        multiply(1536, True, False, True),
        multiply(128, True, True, False),
    ]


if __name__ == "__main__":
    main(interpret, PACKAGES, _variants)
