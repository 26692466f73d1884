"""Time single linears in every backend against those of PyTorch itself, in turns in one process.

python benchmarks/int8_linear.py --rows 1 16 128 1024 --rounds 15 --json benchmarks/results/int8_linear.json

"fp32", "bf16" and "dynamic int8" are PyTorch's own: `F.linear` in both dtypes, and `quantize_dynamic`, whose inputs
have one factor for all rows, by both of its engines (`"x86"` takes fbgemm for linears). The others are engines of
`use_backend`. "(bf16)" takes and gives bfloat16, as inside a packed encoder with `bf16_states`; the others float32.
Several layers of each shape are called one after the other, so that weights come from where they come from in a model.
Time is that of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.report import describe_machine, describe_versions
from lightning_compress.runtime.linear_backends import build_engine, refusal

SHAPES = ["384x1152", "384x384", "384x1536", "1536x384", "768x2304", "768x768", "768x3072", "3072x768"]
LAYERS, WARM_UP = 4, 3
OURS = {
    "int8": ("int8", torch.float32, False),
    "int8 (bf16)": ("int8", torch.bfloat16, False),
    "int8 one factor": ("int8", torch.float32, True),
    "int8 one factor (bf16)": ("int8", torch.bfloat16, True),
    "prepacked bf16": ("bf16", torch.float32, False),
    "prepacked bf16 (bf16)": ("bf16", torch.bfloat16, False),
}
"""Backend, dtype of what goes in and out, and whether all rows share a factor."""

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One cell of the table."""

    rows: int
    num_inputs: int
    num_outputs: int
    name: str
    rounds: int
    microseconds: float
    """Median of a call."""
    ratio: float
    """Median over rounds of the time of PyTorch's fp32 over this one's."""
    p10: float
    p90: float
    error: float
    """Norm of the difference to the fp32 product of the original weights, over its norm."""


def runners(num_inputs: int, num_outputs: int) -> dict[str, tuple[list[Runner], torch.dtype]]:
    """Return all rivals: for each the layers of one shape, and the dtype of what goes in."""
    linears = [nn.Linear(num_inputs, num_outputs) for _ in range(LAYERS)]
    low = [(linear.weight.bfloat16(), linear.bias.bfloat16()) for linear in linears]
    found: dict[str, tuple[list[Any], torch.dtype]] = {
        "fp32": (linears, torch.float32),
        "bf16 (bf16)": (
            [lambda x, w=weight, b=bias: F.linear(x, w, b) for weight, bias in low],
            torch.bfloat16,
        ),
    }
    for engine in ("fbgemm", "onednn"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and still what users have
            torch.backends.quantized.engine = engine
            dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(*linears), {nn.Linear})
        found[f"dynamic int8, {engine}"] = (list(dynamic), torch.float32)
    held = [QuantizedLinear.from_linear(linear, BlockFormat(), BlockFormat()) for linear in linears]
    for name, (backend, dtype, one_factor) in OURS.items():
        if refusal(backend, held, one_factor=one_factor) is None:
            engines = [build_engine(backend, layer, one_factor=one_factor) for layer in held]
            found[name] = (engines, dtype)
    return found


def measure(rows: int, num_inputs: int, num_outputs: int, rounds: int) -> list[Row]:
    """Time all rivals on one shape, in turns, in another order each round: some kernels slow down who comes next."""
    rivals = runners(num_inputs, num_outputs)
    names, x_MK = list(rivals), torch.randn(rows, num_inputs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        for name in random.sample(names, len(names)):
            layers, dtype = rivals[name]
            given = x_MK.to(dtype)
            started = time.thread_time()
            for layer in layers:
                layer(given)
            if number >= WARM_UP:
                samples[name].append((time.thread_time() - started) / len(layers))
    exact = rivals["fp32"][0][0](x_MK)
    return [
        _row(rows, num_inputs, num_outputs, name, samples, _error(rivals[name], x_MK, exact))
        for name in names
    ]


def _row(
    rows: int, num_inputs: int, num_outputs: int, name: str, samples: dict[str, list[float]], error: float
) -> Row:
    own = samples[name]
    ratios = [base / taken for base, taken in zip(samples["fp32"], own, strict=True)]
    tenths = statistics.quantiles(ratios, n=10) if len(ratios) > 1 else ratios * 10
    microseconds, ratio = 1e6 * statistics.median(own), statistics.median(ratios)
    return Row(
        rows, num_inputs, num_outputs, name, len(own), microseconds, ratio, tenths[0], tenths[-1], error
    )


def _error(rival: tuple[list[Runner], torch.dtype], x_MK: Tensor, exact: Tensor) -> float:
    layers, dtype = rival
    error = float((layers[0](x_MK.to(dtype)).float() - exact).norm() / exact.norm())
    assert error < 0.1, f"an error of {error} is no rounding: not timed"
    return error


def show(rows: list[Row]) -> None:
    """Print a table: shapes down, rivals across, times faster than PyTorch's fp32."""
    names = list(dict.fromkeys(row.name for row in rows))
    table = Table("rows", "inputs -> outputs", "fp32 us", *names[1:])
    cells = {(row.rows, row.num_inputs, row.num_outputs, row.name): row for row in rows}
    for count, inputs, outputs in dict.fromkeys(key[:3] for key in cells):
        own = [cells[count, inputs, outputs, name] for name in names]
        ratios = [f"{row.ratio:.2f}" for row in own[1:]]
        table.add_row(str(count), f"{inputs} -> {outputs}", f"{own[0].microseconds:.0f}", *ratios)
    Console(width=160).print(table, describe_machine(), describe_versions())


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs, such as 384x1536")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        for count in args.rows:
            for shape in args.shapes:
                num_inputs, num_outputs = (int(size) for size in shape.split("x"))
                rows += measure(count, num_inputs, num_outputs, args.rounds)
    show(rows)
    if args.json:
        record = {
            "rows": [asdict(row) for row in rows],
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
