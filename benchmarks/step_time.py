"""Time training steps with SoftThresholdRank against plain ones, interleaved in one process, phase by phase.

python benchmarks/step_time.py --batch-size 32 --length 64 --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress import Compressor, SoftThresholdRankConfig
from lightning_compress.report import describe_machine, describe_versions

PHASES = {"warmup": 0.0, "search": 0.2, "recovery": 0.9}


def encoder() -> BertForSequenceClassification:
    """Return an encoder of MiniLM's shape with random weights; attention without dropout, as in the tasks."""
    shape: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    }
    return BertForSequenceClassification(BertConfig(**shape, attention_probs_dropout_prob=0.0)).train()


def stepper(phase: str | None, target: float, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that takes one optimizer step, dense or in one phase of the method."""
    torch.manual_seed(0)
    model, compressor = encoder(), None
    if phase is not None:
        compressor = Compressor(model, [SoftThresholdRankConfig(target_params=target)])
        compressor.prepare()
        for progress in (p for p in (0.0, 0.15, 0.2, 0.9) if p <= PHASES[phase]):
            compressor.update(progress)
        handle = compressor.handles["soft_threshold_rank"]
        assert handle.phase == phase, f"asked for {phase}, got {handle.phase}"
    parameters = list(model.parameters()) if compressor is None else compressor.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
            if compressor is not None:
                compressor.update(PHASES[phase])  # type: ignore[index]
                compressor.begin_step()
                loss = loss + sum(compressor.take_loss_terms().values())
        loss.backward()
        if compressor is not None:
            compressor.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--target", type=float, default=0.5)
    args = parser.parse_args()
    ids = torch.randint(5, 30_000, (args.batch_size, args.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": torch.zeros(args.batch_size, dtype=torch.long)}
    steps = {name: stepper(name, args.target, batch) for name in PHASES}
    steps = {"dense": stepper(None, args.target, batch), **steps}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(args.rounds):
        names = list(steps)
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            started = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - started)
    table = Table("step", "median ms", "p10-p90", "x dense (median of paired ratios)")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["dense"], strict=True)]
        tenths = statistics.quantiles(values, n=10)
        table.add_row(
            name,
            f"{1000 * statistics.median(values):.0f}",
            f"{1000 * tenths[0]:.0f}-{1000 * tenths[-1]:.0f}",
            f"{statistics.median(ratios):.2f}",
        )
    Console().print(table, describe_machine(), describe_versions())


if __name__ == "__main__":
    main()
