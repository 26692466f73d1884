"""Time a dense encoder packed against the same encoder padded, in turns in one process; nothing is dropped.

python benchmarks/packed.py --batch-sizes 1 8 32 --lengths 32 128 256 --fills 0.6 0.19 --rounds 7

Ragged batches are new in every round, as they are in use: low-precision kernels are generated per shape, and a batch
that is repeated would hide what that costs. Time is that of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress.report import describe_machine, describe_versions
from lightning_compress.runtime import pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RAGGED_BATCH_SIZE, RAGGED_LENGTH, WARM_UP = 16, 256, 5
VOCABULARY = 30_000

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    dtype: str
    batch: str
    rounds: int
    fill: float
    """Real tokens over places, the mean over rounds."""
    padded_ms: float
    packed_ms: float
    ratio: float
    """Median over rounds of padded over packed time."""
    p10: float
    p90: float


def encoder(dtype: torch.dtype) -> nn.Module:
    """Return an encoder of MiniLM's shape with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        vocab_size=VOCABULARY,
    )
    return cast(nn.Module, BertForSequenceClassification(config)).eval().to(dtype)


def batch_of(lengths: list[int], width: int) -> Batch:
    """Return random ids of these lengths, padded to ``width``, and their mask."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(5, VOCABULARY, mask.shape) * mask, "attention_mask": mask}


def uniform(batch_size: int, length: int) -> Iterator[Batch]:
    """Yield full batches."""
    while True:
        yield batch_of([length] * batch_size, length)


def ragged(fill: float) -> Iterator[Batch]:
    """Yield batches that are filled to about ``fill``, the longest text to the brim."""
    highest = min(RAGGED_LENGTH, int(2 * fill * RAGGED_LENGTH))
    lowest = max(2, int(2 * fill * RAGGED_LENGTH) - highest)
    while True:
        lengths = [random.randint(lowest, highest) for _ in range(RAGGED_BATCH_SIZE - 1)]
        yield batch_of([RAGGED_LENGTH, *lengths], RAGGED_LENGTH)


def seconds(model: nn.Module, batch: Batch) -> float:
    """Return the processor time of one forward pass."""
    started = time.thread_time()
    model(**batch)
    return time.thread_time() - started


def measure(
    models: tuple[nn.Module, nn.Module], name: str, dtype: str, batches: Iterator[Batch], rounds: int
) -> Row:
    """Time padded and packed on the same batches, in turns."""
    times: list[tuple[float, float]] = []
    fills: list[float] = []
    for number in range(WARM_UP + rounds):
        batch = next(batches)
        order = (0, 1) if number % 2 else (1, 0)
        taken = {which: seconds(models[which], batch) for which in order}
        if number >= WARM_UP:
            times.append((taken[0], taken[1]))
            fills.append(batch["attention_mask"].float().mean().item())
    ratios = [padded / packed for padded, packed in times]
    tenths = statistics.quantiles(ratios, n=10) if len(ratios) > 1 else ratios * 10
    padded_ms, packed_ms = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    fill, ratio = statistics.mean(fills), statistics.median(ratios)
    return Row(dtype, name, rounds, fill, padded_ms, packed_ms, ratio, p10=tenths[0], p90=tenths[-1])


def main() -> None:
    """Parse the command line, check that outputs agree, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--lengths", type=int, nargs="*", default=[32, 128, 256])
    parser.add_argument("--fills", type=float, nargs="*", default=[0.6, 0.19])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7, help="of the longest batches; short ones get more")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        for name in args.dtypes:
            padded = encoder(DTYPES[name])
            models = (padded, pack(copy.deepcopy(padded)))
            sample = next(ragged(0.3))
            torch.testing.assert_close(
                models[1](**sample).logits, padded(**sample).logits, rtol=0.05, atol=0.02
            )
            for size in args.batch_sizes:
                for length in args.lengths:
                    rounds = args.rounds * max(1, min(5, 2048 // (size * length)))
                    rows.append(measure(models, f"{size} x {length}", name, uniform(size, length), rounds))
            for fill in args.fills:
                label = f"{RAGGED_BATCH_SIZE} x {RAGGED_LENGTH}, ragged"
                rows.append(measure(models, label, name, ragged(fill), 2 * args.rounds))
    show(rows)
    if args.json:
        record = {
            "rows": [asdict(row) for row in rows],
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table("dtype", "batch", "filled", "padded ms", "packed ms", "x packed", "p10-p90", "1 / filled")
    for row in rows:
        spread = f"{row.p10:.2f}-{row.p90:.2f}"
        times = f"{row.padded_ms:.1f}", f"{row.packed_ms:.1f}", f"{row.ratio:.2f}"
        table.add_row(row.dtype, row.batch, f"{row.fill:.0%}", *times, spread, f"{1 / row.fill:.2f}")
    Console().print(table, describe_machine(), describe_versions())


if __name__ == "__main__":
    main()
