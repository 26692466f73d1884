"""Time the operators of blocks, and products in floats beside theirs, interleaved in one process.

    python benchmarks/block_ops.py --device cuda --rows 128 4096

Refuses to time what does not agree with the reference, bit for bit. On CPU the operators *are* their references, whose
aim is to be exact: what is fast there are the engines of quantised layers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from operator_rounds import Call, cell, microseconds_in_turns
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_dequantize import reference as dequantizer
from lightning_compress.ops.block_matmul import block_matmul
from lightning_compress.ops.block_matmul import reference as multiplier
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.block_quantize import reference as quantizer
from lightning_compress.report import describe_machine, describe_versions

__all__ = ["BLOCKS", "Case", "check", "main"]

BLOCKS = {
    "row": ((1, 0), (1, 0)),
    "128": ((1, 128), (128, 128)),
    "64x64": ((64, 64), (64, 64)),
    "32x32": ((32, 32), (32, 32)),
    "1x32": ((1, 32), (1, 32)),
}
"""Blocks of inputs and of weights."""

COLUMNS = ("operator", "reference", "float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One linear layer on some rows, with 8 bits for inputs and weights."""

    rows: int
    depth: int
    outputs: int
    blocks: str
    factor: str

    def calls(self, device: str) -> dict[str, dict[str, Call]]:
        """Return what is timed, by what it does: the operator first, the reference second, then floats."""
        generator = torch.Generator().manual_seed(0)
        x_MK = torch.randn(self.rows, self.depth, generator=generator).to(device)
        weight_NK = torch.randn(self.outputs, self.depth, generator=generator).to(device)
        bias_N = torch.randn(self.outputs, generator=generator).to(device)
        (x_block, weight_block), factor = BLOCKS[self.blocks], self.factor
        x_payload, x_factor = quantizer.block_quantize(x_MK, 8, *x_block, factor)
        payload, factors = quantizer.block_quantize(weight_NK, 8, *weight_block, factor)
        operands = (x_payload, x_factor, payload, factors, bias_N)
        return {
            "quantise": {
                "operator": lambda: block_quantize(x_MK, 8, x_block, factor),
                "reference": lambda: quantizer.block_quantize(x_MK, 8, *x_block, factor),
            },
            "dequantise": {
                "operator": lambda: block_dequantize(payload, factors, weight_block),
                "reference": lambda: dequantizer.block_dequantize(payload, factors, *weight_block),
            },
            "multiply": {
                "operator": lambda: block_matmul(*operands, x_block, weight_block, factor),
                "reference": lambda: multiplier.block_matmul(*operands, *x_block, *weight_block, 6),
                **_in_floats(x_MK, weight_NK, bias_N),
            },
        }


def check(calls: dict[str, Call]) -> None:
    """Compare an operator with its reference.

    Raises:
        RuntimeError: If anything differs by a bit.
    """
    found, expected = (
        [made] if isinstance(made := calls[name](), Tensor) else made for name in ("operator", "reference")
    )
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
        raise RuntimeError("the operator: not what the reference gives, so nothing is timed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case of the command line and print a table for each layer."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    layers = [tuple(int(size) for size in layer.split("x")) for layer in options.layers]
    for rows, (depth, outputs) in itertools.product(options.rows, layers):
        table = Table("blocks", "call", title=f"{rows} × {depth} × {outputs}")
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for blocks, factor in itertools.product(options.blocks, options.factors):
            for what, calls in Case(rows, depth, outputs, blocks, factor).calls(options.device).items():
                check(calls)
                samples = microseconds_in_turns(calls, options.rounds, options.clock, options.device)
                cells = (cell(samples, name, "operator") if name in samples else "" for name in COLUMNS)
                table.add_row(f"{blocks} {factor}", what, *cells)
        Console().print(table)
    machine = describe_machine()
    where = machine.get("gpu") if options.device.startswith("cuda") else machine["cpu"]
    versions = ", ".join(f"{package} {version}" for package, version in describe_versions().items())
    Console().print("Microseconds per call, median; in brackets: median of the paired ratios to the operator")
    Console().print(f"{where}, {options.threads} thread(s), {options.clock} clock, {versions}")


def _in_floats(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> dict[str, Call]:
    def in_dtype(dtype: torch.dtype) -> Call:
        tensors = [tensor.to(dtype) for tensor in (x_MK, weight_NK, bias_N)]
        return lambda: F.linear(*tensors)

    return {"float32": in_dtype(torch.float32), "bfloat16": in_dtype(torch.bfloat16)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--layers", nargs="+", default=["384x1536"], help="inputs x outputs of linear layers")
    parser.add_argument("--blocks", choices=list(BLOCKS), nargs="+", default=list(BLOCKS))
    parser.add_argument("--factors", choices=["scale", "shift"], nargs="+", default=["scale", "shift"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a crowded machine")
    return parser


if __name__ == "__main__":
    main()
