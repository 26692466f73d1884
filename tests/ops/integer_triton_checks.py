"""What is to be known about the kernels of integers without a GPU; `test_integer_triton.py` runs this.

    TRITON_INTERPRET=1 python tests/ops/integer_triton_checks.py interpret
    python tests/ops/integer_triton_checks.py compile

Processes of their own, because Triton decides at decoration time whether a kernel is interpreted.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tests.ops.triton_compile import Variant, main

SHAPES = ((1, 1), (3, 5), (9, 130), (2, 700), (0, 4), (3, 0))
PACKAGES = ("integer_softmax", "integer_gelu", "integer_layernorm", "integer_blocks")
FUNCTIONS = ("gelu", "gelu_tanh", "silu", "relu")
BLOCKS = ("softmax_of_blocks", "gelu_of_blocks", "layernorm_of_blocks")


def interpret() -> dict[str, list[str]]:
    """Compares the interpreted kernels with the references; returns what differs, by check."""
    return {
        "aligned rows": _differing_rows(),
        "softmax": _differing_probabilities(),
        "activations": _differing_activations(),
        "norms": _differing_norms(),
        "blocks": _differing_blocks(),
        "what kernels cannot do": _differing_fallbacks(),
    }


def _differing_rows() -> list[str]:
    """Rows become integers within the kernels for blocks; here they do nothing else."""
    import triton
    import triton.language as tl

    from lightning_compress.ops import fixed_point
    from lightning_compress.ops.fixed_point import triton_functions

    align_rows = triton_functions.align_rows

    @triton.jit
    def kernel(x_ptr, value_ptr, exponent_ptr, BITS: tl.constexpr, C: tl.constexpr):
        at = tl.program_id(0) * C + tl.arange(0, C)[None, :]
        value, exponent = align_rows(tl.load(x_ptr + at), BITS)
        tl.store(value_ptr + at, value)
        tl.store(exponent_ptr + tl.program_id(0) + tl.arange(0, 1), exponent)

    kernel.fn.__globals__["align_rows"] = align_rows
    kernel.fn.__globals__["tl"] = tl
    x = torch.randn(60, 8) * torch.exp(20 * torch.randn(60, 1))
    x[0], x[1], x[2] = 0.0, 1.4e-45, 3.4e38
    x[3] = torch.tensor([32767.5, 2**23 + 1.0, -(2**22) - 0.5, 0.5, 1.5, -0.5, 2**21 + 0.25, 2**24])
    differing = []
    for bits in (8, 16, 24, 25, 26, 31):
        value, exponent = torch.empty(60, 8, dtype=torch.int32), torch.empty(60, dtype=torch.int32)
        kernel[(60,)](x, value, exponent, BITS=bits, C=8)
        expected = fixed_point.align_rows(x, bits)
        if not (torch.equal(value, expected[0]) and torch.equal(exponent, expected[1])):
            differing.append(f"{bits} bits")
    return differing


def _differing_probabilities() -> list[str]:
    from lightning_compress.ops.integer_softmax import reference, triton_kernel

    differing = []
    for shape, (most, factor) in itertools.product(SHAPES, ((2**30 - 1, 5909), (40, 1), (40, 2**17))):
        value, exponent = _rows(shape, most)
        masks = (None, torch.rand(shape) < 0.4, torch.zeros(shape, dtype=torch.bool))
        for seen, by_row in itertools.product(masks, (False, True)):
            arguments = (value, exponent, seen, factor, by_row)
            if not _same(triton_kernel.integer_softmax(*arguments), reference.integer_softmax(*arguments)):
                differing.append(f"{shape}, up to {most}, {factor}, {'un' * (seen is None)}masked, {by_row}")
    return differing


def _differing_activations() -> list[str]:
    from lightning_compress.ops.integer_gelu import reference, triton_kernel

    differing = []
    for shape, most, function in itertools.product(SHAPES, (2**15 - 1, 40), FUNCTIONS):
        arguments = (*_rows(shape, most), function)
        if not _same(triton_kernel.integer_gelu(*arguments), reference.integer_gelu(*arguments)):
            differing.append(f"{shape}, up to {most}, {function}")
    return differing


def _differing_norms() -> list[str]:
    from lightning_compress.ops.integer_layernorm import fixed_point_affine, reference, triton_kernel

    differing = []
    cases = itertools.product(SHAPES[:-1], (2**15 - 1, 2), (0.0, 1e-12, 1e-5), (False, True))
    for shape, most, eps, is_centred in cases:
        for bias in (None, torch.randn(shape[1])):
            affine = fixed_point_affine(torch.randn(shape[1]), bias)
            arguments = (*_rows(shape, most), *affine, eps, is_centred)
            if not _same(
                triton_kernel.integer_layernorm(*arguments), reference.integer_layernorm(*arguments)
            ):
                differing.append(f"{shape}, up to {most}, eps {eps}, {is_centred}, {bias is not None}")
    return differing


def _differing_blocks(columns: tuple[int, ...] = (0, 4, 32)) -> list[str]:
    from lightning_compress.ops.integer_blocks import reference, triton_kernel

    return [
        f"{name}, {shape}, {width} columns, {factor}"
        for shape, width, factor in itertools.product(SHAPES[:-1], columns, ("scale", "shift"))
        for name, arguments in _block_arguments(shape, width, factor)
        if not _same(getattr(triton_kernel, name)(*arguments), getattr(reference, name)(*arguments))
    ]


def _differing_fallbacks() -> list[str]:
    """Blocks of three columns, and rows longer than a program holds."""
    from lightning_compress.ops.integer_blocks import triton_kernel as blocks
    from lightning_compress.ops.integer_blocks import triton_tiles as tiles
    from lightning_compress.ops.integer_layernorm import triton_kernel as norms
    from lightning_compress.ops.integer_softmax import triton_kernel as softmax

    differing = _differing_blocks((3,))
    blocks.MAX_COLUMNS = tiles.MAX_COLUMNS = norms.MAX_COLUMNS = softmax.MAX_COLUMNS = 4
    return differing + _differing_blocks() + _differing_norms() + _differing_probabilities()


def _block_arguments(shape: tuple[int, int], columns: int, factor: str) -> list[tuple[str, tuple]]:
    from lightning_compress.ops.block_quantize.reference import block_quantize
    from lightning_compress.ops.integer_layernorm import fixed_point_affine

    x = torch.randn(shape) * torch.exp(2 * torch.randn(shape[0], 1))
    x[1:2] = 0.0
    payload, factors = block_quantize(x, 8, 1, columns, factor)
    weight, bias = torch.randn(2, shape[1])
    seen = torch.rand(shape) < 0.6
    return [
        ("softmax_of_blocks", (payload, factors, seen, columns, 5909)),
        ("softmax_of_blocks", (payload, factors, None, columns, 47274)),
        *(("gelu_of_blocks", (payload, factors, columns, function, 8)) for function in FUNCTIONS),
        *(
            ("layernorm_of_blocks", (payload, factors, *affine, 1e-5, affine[1] is None, columns, 4))
            for affine in (fixed_point_affine(weight), fixed_point_affine(weight, bias))
        ),
    ]


def _rows(shape: tuple[int, int], most: int) -> tuple[Tensor, Tensor]:
    value = torch.randint(-most, most + 1, shape, dtype=torch.int32)
    value[1:2] = most  # one row of equal numbers
    return value, torch.randint(-40, 10, shape[:1], dtype=torch.int32)


def _same(found: Any, expected: Any) -> bool:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return all(
        ours.dtype == theirs.dtype and ours.is_contiguous() and torch.equal(ours, theirs)
        for ours, theirs in pairs
    )


def _variants() -> list[Variant]:
    """All kernels, for the widths of MiniLM and others."""
    from lightning_compress.ops.fixed_point.triton_functions import row_tiles
    from lightning_compress.ops.integer_blocks import triton_kernel as blocks
    from lightning_compress.ops.integer_gelu import triton_kernel as gelu
    from lightning_compress.ops.integer_layernorm import triton_kernel as norm
    from lightning_compress.ops.integer_softmax import triton_kernel as softmax

    rows = {"value_ptr": "*i32", "exponent_ptr": "*i32", "out_ptr": "*i32"}
    masked = {"seen_ptr": "*u8", "weight_ptr": "*i32", "out_ptr": "*u8"}
    affine = {"gamma_ptr": "*i16", "beta_ptr": "*i32", "mean": "i64"}
    norms = {"IS_CENTRED": True, "HAS_BETA": True}

    def variant(name: str, kernel: Any, kinds: dict[str, str], constants: dict[str, Any]) -> Variant:
        return Variant(name, kernel, kinds, constants, aligned=("width",))

    def of_blocks(factor: str, width: int, columns: int) -> tuple[dict[str, str], dict[str, Any]]:
        kinds = {"payload_ptr": "*i8", "factor_ptr": factor, "out_ptr": "*i8", "out_factor_ptr": factor}
        payload, factors = torch.empty(1, width), torch.empty(1, dtype=torch.int8 if "8" in factor else None)
        sizes = blocks.block_sizes(payload, factors, columns, 8)
        assert sizes is not None
        return kinds, sizes

    def norm_of_blocks(factor: str, width: int, columns: int) -> Variant:
        kinds, sizes = of_blocks(factor, width, columns)
        return variant(
            f"norm {width} {factor}", blocks.layernorm_blocks_kernel, kinds | affine, sizes | norms
        )

    table, units, digits = ({name: "*i32"} for name in ("table_ptr", "unit_ptr", "digits_ptr"))
    mask = row_tiles(512) | {"HAS_MASK": True}
    kinds, sizes = of_blocks("*fp32", 1536, 128)
    bytes_in = {"payload_ptr": "*i8", "factor_ptr": "*i8"}
    own = {"IS_SHIFT": True, "COLUMNS": 32}
    return [
        variant("softmax 512", softmax.softmax_kernel, rows | masked | digits, mask | {"BY_ROW": True}),
        variant(
            "gelu 3072", gelu.gelu_kernel, rows | table | units, gelu.tile_sizes(3072) | {"LIMIT": 2**19}
        ),
        variant("norm 384", norm.layernorm_kernel, rows | affine, row_tiles(384) | norms),
        variant("norm 4096", norm.layernorm_kernel, rows | affine, row_tiles(4096) | norms),
        variant("gelu 1536 *fp32", blocks.gelu_blocks_kernel, kinds | table, sizes | {"LIMIT": 2**17}),
        norm_of_blocks("*fp32", 384, 0),
        norm_of_blocks("*i8", 3072, 32),
        variant("softmax 512 *i8", blocks.softmax_blocks_kernel, bytes_in | masked, mask | own),
    ]


if __name__ == "__main__":
    main(interpret, PACKAGES, _variants)
