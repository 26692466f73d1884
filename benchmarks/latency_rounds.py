"""Timing of rivals over whole texts: batches as they come, rounds in turns, ratios paired by round."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from recipe import data_of, header
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

__all__ = [
    "Batch",
    "Runner",
    "add_options",
    "batches_of",
    "in_turns",
    "latency_rows",
    "median_ratio",
    "print_latency",
    "runner",
    "timed_batches",
]

BASELINES = ("dense fp32", "dense bf16")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SINGLES = 24
"""At most so many texts are timed one by one."""

Batch = dict[str, Tensor]
Runner = Callable[[list[Batch]], None]
"""Answers all batches."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every timing command is told."""
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")


def batches_of(
    name: str, batch_size: int, limit: int | None, part: str = "test"
) -> tuple[list[Batch], list[Tensor]]:
    """Return batches of texts as they come, and their labels.

    Args:
        name: Data set.
        batch_size: Texts in a batch.
        limit: As many batches as hold so many texts, at least one; None takes all.
        part: ``"test"`` or ``"train"``.
    """
    data = data_of(name, batch_size, bucket=False)
    data.prepare_data()
    data.setup("test" if part == "test" else "fit")
    loader: Any = data.test_dataloader() if part == "test" else data.train_dataloader()
    count = None if limit is None else max(1, -(-limit // batch_size))
    batches = [dict(batch) for batch in islice(loader, count)]
    return batches, [batch.pop("labels") for batch in batches]


def timed_batches(name: str, batch_size: int, texts: int) -> list[Batch]:
    """Return test batches without labels; fewer texts where they come one by one."""
    batches, _ = batches_of(name, batch_size, min(texts, SINGLES) if batch_size == 1 else texts)
    return batches


def runner(model: nn.Module) -> Runner:
    """Return a model as what answers batches."""
    model.eval()

    def run(batches: list[Batch]) -> None:
        with torch.inference_mode():
            for batch in batches:
                model(**batch)

    return run


def in_turns(
    rivals: dict[str, Runner], batches: list[Batch], rounds: int, clock: str = "cpu"
) -> dict[str, list[float]]:
    """Return seconds of each rival over all batches, round by round; each round begins with another one."""
    now = CLOCKS[clock]
    for run in rivals.values():
        run(batches[:1])
    samples: dict[str, list[float]] = {key: [] for key in rivals}
    order = list(rivals)
    for index in range(rounds):
        start = index % len(order)
        for key in order[start:] + order[:start]:
            begun = now()
            rivals[key](batches)
            samples[key].append(now() - begun)
    return samples


def median_ratio(baseline: list[float], seconds: list[float]) -> float:
    """Return how many times faster than the baseline, the median of ratios within a round."""
    return statistics.median(base / own for base, own in zip(baseline, seconds, strict=True))


def latency_rows(
    name: str,
    batch_size: int,
    batches: list[Batch],
    clock: str,
    samples: dict[str, list[float]],
    flops: dict[str, float],
    **more: Any,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each rival.

    Args:
        name: Data set.
        batch_size: Texts in a batch.
        batches: What was timed.
        clock: What was timed by.
        samples: Seconds of each rival, by round.
        flops: Dense over own FLOPs, of those rivals that have such.
        more: Fields of every row.
    """
    for key, seconds in samples.items():
        yield {
            **header(name, key, 0),
            "batch_size": batch_size,
            "texts": sum(len(batch["input_ids"]) for batch in batches),
            "threads": torch.get_num_threads(),
            "clock": clock,
            **more,
            "median_seconds": statistics.median(seconds),
            "seconds": [round(s, 5) for s in seconds],
            "flops_speedup_run": flops.get(key),
        }


def print_latency(
    name: str, batch_size: int, samples: dict[str, list[float]], flops: dict[str, float]
) -> None:
    """Print the rivals, each against the dense model in both dtypes."""
    table = Table("model", "ms", "x dense fp32", "x dense bf16", "FLOPs", title=f"{name}, batch {batch_size}")
    for key, seconds in samples.items():
        ratios = [median_ratio(samples[baseline], seconds) for baseline in BASELINES]
        flop = f"{flops[key]:.2f}" if key in flops else ""
        table.add_row(key, f"{1e3 * statistics.median(seconds):.1f}", *(f"{r:.2f}" for r in ratios), flop)
    Console().print(table)
