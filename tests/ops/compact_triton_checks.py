"""What is to be known about the Triton kernel without a GPU; `test_compact_triton.py` runs this and reads the answer.

    TRITON_INTERPRET=1 python tests/ops/compact_triton_checks.py interpret
    python tests/ops/compact_triton_checks.py compile

Processes of their own, because Triton decides at decoration time whether a kernel is interpreted.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tests.ops.triton_compile import Variant, main

LENGTHS = {
    "no sequence": [],
    "an empty sequence": [0],
    "one token": [1],
    "odd lengths": [3, 1, 11, 7],
    "empty ones between": [0, 0, 9, 0, 0, 5, 0],
    "one long one": [61],
    "more sequences than are scanned at once": [1] * 70,
}
WIDTHS = (1, 3, 64, 130, 600)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEPT_RATIOS = (0.0, 0.5, 1.0)


def interpret() -> dict[str, list[str]]:
    """Compares the interpreted kernel with the reference; returns what differs, by check."""
    return {
        "sizes": _differing_sizes(),
        "dtypes and strides": _differing_layouts(),
        "many tiles and scans": _differing_loops(),
        "writes elsewhere": _writes_elsewhere(),
    }


def _differing_sizes() -> list[str]:
    return [
        f"{name}, {width} wide, {ratio} kept"
        for (name, lengths), width, ratio in itertools.product(LENGTHS.items(), WIDTHS, KEPT_RATIOS)
        if not _agrees(*_example(lengths, width, ratio))
    ]


def _differing_layouts() -> list[str]:
    differing = []
    for dtype, offsets in itertools.product(DTYPES, (torch.int32, torch.int64)):
        hidden, keep, cu_seqlens = _example([5, 0, 8], 6)
        hidden, cu_seqlens = hidden.to(dtype), cu_seqlens.to(offsets)
        layouts = {"plain": hidden, "wide": hidden[:, 1:4], "transposed": hidden.t().contiguous().t()}
        differing += [
            f"{dtype}, {offsets}, {layout}"
            for layout, rows in layouts.items()
            if not _agrees(rows, keep, cu_seqlens)
        ]
        strided = torch.stack([keep, ~keep], dim=1)[:, 0]
        if not _agrees(hidden, strided, torch.stack([cu_seqlens, cu_seqlens], dim=1)[:, 0]):
            differing.append(f"{dtype}, {offsets}, strided decisions and offsets")
    return differing


def _differing_loops() -> list[str]:
    """Few programs of many tiles, counting a few decisions at a time."""
    from lightning_compress.ops.compact import triton_kernel

    differing = []
    for programs, scanned in itertools.product((1, 3, 1024), (4, 1024)):
        triton_kernel.MAX_PROGRAMS, triton_kernel.NUM_SCANNED = programs, scanned
        if not _agrees(*_example([40, 0, 83, 1, 76], 5)):
            differing.append(f"{programs} programs, {scanned} at once")
    return differing


def _writes_elsewhere() -> list[str]:
    """Runs into outputs full of NaN, or -1, and looks behind the rows that stay."""
    from lightning_compress.ops.compact import triton_kernel

    touched = []
    for name, lengths in LENGTHS.items():
        hidden, keep, cu_seqlens = _example(lengths, 5)
        out = torch.full((len(keep) + 16, 5), torch.nan)
        index = torch.full((len(keep) + 16,), -1)
        moved = torch.full((len(cu_seqlens) + 17,), -1)
        triton_kernel.launch(hidden, keep, cu_seqlens, out, index, moved)
        num_kept = int(keep.sum())
        clean = torch.equal(out[:num_kept], hidden[keep]) and bool(out[num_kept:].isnan().all())
        clean &= bool((index[num_kept:] == -1).all()) and bool((moved[len(cu_seqlens) + 1 :] == -1).all())
        if not clean or int(moved[len(cu_seqlens)]) != num_kept:
            touched.append(name)
    return touched


def _example(lengths: list[int], width: int, ratio: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    return torch.randn(sum(lengths), width), torch.rand(sum(lengths)) < ratio, cu_seqlens


def _agrees(hidden: Tensor, keep: Tensor, cu_seqlens: Tensor) -> bool:
    from lightning_compress.ops.compact import reference, triton_kernel

    found = triton_kernel.compact(hidden, keep, cu_seqlens)
    expected = reference.compact(hidden, keep, cu_seqlens)
    return all(
        ours.dtype == theirs.dtype and ours.is_contiguous() and torch.equal(ours, theirs)
        for ours, theirs in zip(found, expected, strict=True)
    )


def _variants() -> list[Variant]:
    """Two widths, in both dtypes of hidden states and of offsets."""
    from lightning_compress.ops.compact.triton_kernel import compact_kernel, tile_sizes

    variants = []
    for dtype, offsets, width in itertools.product(("fp32", "bf16"), ("i32", "i64"), (384, 768)):
        kinds = {"hidden_ptr": f"*{dtype}", "keep_ptr": "*u8", "cu_seqlens_ptr": f"*{offsets}"}
        kinds |= {"out_ptr": f"*{dtype}", "index_ptr": "*i64", "moved_ptr": f"*{offsets}"}
        name = f"{dtype} {offsets} {width}"
        variants.append(Variant(name, compact_kernel, kinds, tile_sizes(width), aligned=("row_stride",)))
    return variants


if __name__ == "__main__":
    main(interpret, ("compact",), _variants)
