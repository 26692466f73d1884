"""Time training steps with a method against plain ones, interleaved in one process, phase by phase.

python benchmarks/step_time.py --batch-size 32 --length 64 --rounds 15
python benchmarks/step_time.py --method contribution_token_dropping --batch-size 16 --length 256 --rounds 9

Token dropping computes saliencies when it first sees a text (``first epoch``) and looks them up afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress import (
    BlockQuantizationConfig,
    BottleneckTokenDroppingConfig,
    Compressor,
    ContributionTokenDroppingConfig,
    SoftThresholdRankConfig,
)
from lightning_compress.methods import MethodConfig
from lightning_compress.nn.saliency import SaliencyCache
from lightning_compress.report import describe_machine, describe_versions

BOTTLENECK = BottleneckTokenDroppingConfig(target_flops=0.5, ramp_end=0.8)
DROPPING = ContributionTokenDroppingConfig(target_flops=0.5, warmup=0.0, ramp_end=0.8)
STEPS: dict[str, dict[str, tuple[MethodConfig, str, float, bool]]] = {
    "soft_threshold_rank": {
        "warmup": (SoftThresholdRankConfig(target_params=0.5), "warmup", 0.0, False),
        "search": (SoftThresholdRankConfig(target_params=0.5), "search", 0.2, False),
        "recovery": (SoftThresholdRankConfig(target_params=0.5), "recovery", 0.9, False),
    },
    "contribution_token_dropping": {
        "first epoch": (DROPPING, "ramp", 0.2, True),
        "later epochs": (DROPPING, "ramp", 0.2, False),
        "later, saliency to encoder": (
            dataclasses.replace(DROPPING, saliency_to_encoder=True),
            "ramp",
            0.2,
            False,
        ),
    },
    "bottleneck_token_dropping": {
        "search": (BOTTLENECK, "search", 0.2, False),
        "search, 64 wide": (dataclasses.replace(BOTTLENECK, sampler_width=64), "search", 0.2, False),
        "recovery": (BOTTLENECK, "recovery", 0.9, False),
    },
    "block_quantization": {
        "ramp": (BlockQuantizationConfig(start=0.1), "ramp", 0.2, False),
        "rounded": (BlockQuantizationConfig(start=0.1), "rounded", 0.9, False),
        "w4a4, 1x128": (
            BlockQuantizationConfig(preset="w4a4", block=(1, 128), start=0.1),
            "rounded",
            0.9,
            False,
        ),
        "w4a4, 32x32, shifts": (
            BlockQuantizationConfig(preset="w4a4", block=(32, 32), factor="shift", start=0.1),
            "rounded",
            0.9,
            False,
        ),
        "everything": (BlockQuantizationConfig(operators=("all",), start=0.1), "rounded", 0.9, False),
    },
}
"""Per method and kind of step: configuration, phase, progress, and whether texts are new in each step."""


def encoder() -> BertForSequenceClassification:
    """Return an encoder of MiniLM's shape with random weights; attention without dropout, as in the tasks."""
    shape: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    }
    return BertForSequenceClassification(BertConfig(**shape, attention_probs_dropout_prob=0.0)).train()


def stepper(
    batch: dict[str, torch.Tensor],
    config: MethodConfig | None = None,
    phase: str = "",
    progress: float = 0.0,
    is_new: bool = False,
) -> Callable[[], None]:
    """Return a function that takes one optimizer step, dense or in one phase of a method."""
    torch.manual_seed(0)
    model, compressor = encoder(), None
    if config is not None:
        compressor = Compressor(model, [config])
        compressor.prepare()
        for before in (p for p in (0.0, 0.15, 0.2, 0.9) if p <= progress):
            compressor.update(before)
        handle: Any = compressor.handles[config.stem]
        assert handle.phase == phase, f"asked for {phase}, got {handle.phase}"
    parameters = list(model.parameters()) if compressor is None else compressor.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> None:
        if is_new:
            handle.teacher.cache.load_state_dict(SaliencyCache().state_dict())
        if compressor is not None:
            compressor.update(progress)
            compressor.begin_step()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
            if compressor is not None:
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
    parser.add_argument("--method", choices=STEPS, default="soft_threshold_rank")
    args = parser.parse_args()
    ids = torch.randint(5, 30_000, (args.batch_size, args.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": torch.zeros(args.batch_size, dtype=torch.long)}
    steps = {name: stepper(batch, *settings) for name, settings in STEPS[args.method].items()}
    steps = {"dense": stepper(batch), **steps}
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
