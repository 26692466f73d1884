"""Fine-tune encoders dense, go on dense and compressed by one recipe, and append what came out to a results file.

Every row is one run: a data set, a variant, a seed. Variant ``base`` fine-tunes the pretrained encoder; every other
one starts from that checkpoint and gets the same steps again, ``dense`` included, so all budgets are equal. Runs that
the results file already holds are skipped, so the command can be stopped and started again. Data are looked for in
the folder named by LIGHTNING_COMPRESS_DATA.

    python benchmarks/soft_threshold_rank.py train --tasks sst2 ag_news imdb --variants base dense rank50 rank25
    python benchmarks/soft_threshold_rank.py latency --tasks sst2
    python benchmarks/soft_threshold_rank.py table
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import recipe
import torch
from lightning.pytorch import seed_everything
from recipe import LEARNING_RATE, data_of, fit, header, load_model, save
from rich.console import Console
from rich.table import Table
from rows import RESULTS, rows_in, train_missing

import lightning_compress
from lightning_compress.callbacks import SoftThresholdRank
from lightning_compress.data import TextClassificationData
from lightning_compress.deploy import attach_plan, disk_bytes
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.report.latency import measure_latency

ROWS = "soft_threshold_rank.jsonl"
MODELS = Path("runs") / "benchmarks" / "soft_threshold_rank"

TASKS = {
    "sst2": recipe.TASKS["sst2"],
    "ag_news": recipe.TASKS["ag_news"],
    "imdb": replace(recipe.TASKS["imdb"], steps=80),
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "dense": None,
    "rank50": {"target_params": 0.5},
    "rank25": {"target_params": 0.25},
    "uniform50": {"target_params": 0.5, "allocation": "uniform"},
    "uniform25": {"target_params": 0.25, "allocation": "uniform"},
    "svd50": {"target_params": 0.5, "init": "svd"},
    "exp50": {"target_params": 0.5, "regularizer": "exp"},
}


def train(name: str, variant: str, seed: int) -> dict[str, Any]:
    """Run one training and return its row; the trained model is saved under ``runs/``."""
    seed_everything(seed)
    settings = VARIANTS[variant]
    callbacks = [] if settings is None else [SoftThresholdRank(**settings)]
    start = "minilm" if variant == "base" else str(MODELS / f"{name}-base-{seed}")
    done = fit(name, callbacks, start, TASKS[name].steps)
    (metrics,) = done.trainer.test(done.module, datamodule=done.data, verbose=False)
    folder = MODELS / f"{name}-{variant}-{seed}"
    save(done.model, done.data, folder)
    return {
        **header(name, variant, seed, TASKS[name].steps),
        "accuracy": metrics["test/acc"],
        "learning_rate": LEARNING_RATE,
        "fit_seconds": round(done.seconds, 1),
        "step_seconds": _thirds(done.clock.seconds),
        **_sizes(done.model, done.data),
        "weight_bytes": disk_bytes(folder),
        "ranks": _ranks(done.model),
    }


def training_free(name: str, seed: int, ratio: float) -> dict[str, Any]:
    """Factorise the base model by whitened SVD at uniform ranks, without training, and test it."""
    data = data_of(name)
    data.prepare_data()
    data.setup("fit")
    model = load_model(MODELS / f"{name}-base-{seed}")
    config = SoftThresholdRankConfig(target_params=ratio, allocation="uniform")
    compressor = lightning_compress.Compressor(model, [config])
    compressor.prepare()
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(8), strict=False)]
    compressor.calibrate(batches)
    compressor.update(config.warmup)
    attach_plan(model, compressor.convert())
    data.setup("test")
    model.eval()
    right = total = 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for batch in data.test_dataloader():
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
            total += len(labels)
    variant = f"free{round(100 * ratio)}"
    return {
        **header(name, variant, seed, TASKS[name].steps),
        "accuracy": right / total,
        **_sizes(model, data),
        "ranks": _ranks(model),
    }


def _sizes(model: Any, data: TextClassificationData) -> dict[str, Any]:
    parameters = count_parameters(model)
    return {
        "parameters": {scope: getattr(parameters, scope) for scope in ("linear", "encoder", "total")},
        "flops": count_flops(model, data.lengths("test")).total,
    }


def _ranks(model: Any) -> dict[str, int]:
    return {name: m.rank for name, m in model.named_modules() if type(m).__name__ == "LowRankLinear"}


def _thirds(seconds: list[float]) -> dict[str, float]:
    """Median step time at the start (warm-up), in the middle of the search, and in recovery."""
    n = len(seconds)
    parts = {
        "warmup": seconds[2 : n // 10],
        "search": seconds[n // 8 : n // 2 - 1],
        "recovery": seconds[n // 2 + 1 :],
    }
    return {part: round(sorted(values)[len(values) // 2], 4) for part, values in parts.items() if values}


def run_training(tasks: list[str], variants: list[str], seeds: list[int]) -> None:
    """Run what is missing, cheapest data sets first."""
    for row in train_missing(ROWS, tasks, variants, seeds, _trained):
        print(
            f"{row['task']} {row['variant']} seed {row['seed']}: accuracy {row['accuracy']:.4f}", flush=True
        )


def _trained(name: str, variant: str, seed: int) -> dict[str, Any]:
    if variant.startswith("free"):
        return training_free(name, seed, float(variant.removeprefix("free")) / 100)
    return train(name, variant, seed)


def run_latency(
    name: str, variants: list[str], rounds: int, batch_sizes: list[int], lengths: list[int]
) -> None:
    """Time the saved models of one data set against the dense one, interleaved."""
    models = {variant: MODELS / f"{name}-{variant}-0" for variant in variants}
    table = measure_latency(models, batch_sizes, lengths, rounds=rounds)
    Console().print(table.to_rich())
    (RESULTS / f"latency_{name}.json").write_text(table.to_json())


def print_table() -> None:
    """Print all rows, each against the dense run of the same data set and seed."""
    rows = rows_in(ROWS)
    dense = {(r["task"], r["seed"]): r for r in rows if r["variant"] == "dense"}
    table = Table(
        "data",
        "variant",
        "seed",
        "steps",
        "accuracy",
        "vs dense",
        "linear",
        "encoder",
        "total",
        "FLOPs",
        "MB",
        "commit",
    )
    for row in sorted(rows, key=lambda r: (r["task"], r["variant"], r["seed"])):
        base = dense[row["task"], row["seed"]]
        share = {s: row["parameters"][s] / base["parameters"][s] for s in ("linear", "encoder", "total")}
        size = f"{row['weight_bytes'] / 1e6:.1f}" if "weight_bytes" in row else ""
        table.add_row(
            row["task"], row["variant"], str(row["seed"]), str(row["steps"]), f"{100 * row['accuracy']:.2f}",
            f"{100 * (row['accuracy'] - base['accuracy']):+.2f}", *(f"{v:.3f}" for v in share.values()),
            f"{row['flops'] / base['flops']:.3f}", size, row["commit"],
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    training.add_argument("--variants", nargs="+", default=["base", "dense", "rank50", "rank25"])
    training.add_argument("--seeds", nargs="+", type=int, default=[0])
    latency = commands.add_parser("latency")
    latency.add_argument("--tasks", nargs="+", default=["sst2"], choices=TASKS)
    latency.add_argument("--variants", nargs="+", default=["dense", "rank50", "rank25"])
    latency.add_argument("--rounds", type=int, default=21)
    latency.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    latency.add_argument("--lengths", nargs="+", type=int, default=[32, 128])
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "train":
        run_training(args.tasks, args.variants, args.seeds)
    elif args.command == "latency":
        for name in args.tasks:
            run_latency(name, args.variants, args.rounds, args.batch_sizes, args.lengths)
    else:
        print_table()


if __name__ == "__main__":
    main()
