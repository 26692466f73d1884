"""Fine-tune encoders dense and with tokens dropped by one recipe, and append what came out to a results file.

Every row is one run: a data set, a variant, a seed. Variant ``base`` fine-tunes the pretrained encoder; every other
one starts from that checkpoint and gets the same number of steps again, ``dense`` included. Runs that the results file
already holds are skipped, so the command can be stopped and started again. Data are looked for in the folder named by
LIGHTNING_COMPRESS_DATA.

    python benchmarks/token_dropping.py train --tasks sst2 ag_news imdb movies --variants base dense flops50 flops25
    python benchmarks/token_dropping.py evaluate --tasks sst2 --variants dense
    python benchmarks/token_dropping.py dial --tasks sst2
    python benchmarks/token_dropping.py latency --tasks imdb
    python benchmarks/token_dropping.py table

``dial`` moves the thresholds of trained models without training. ``latency`` times whole data, as texts come, against
what users have instead; onnxruntime takes part where it is installed. FLOPs are 2 MACs over unpadded tokens, the ratio
of totals over the test part: ``speedup`` prices the last layer in full, as the paper does; ``speedup_run`` as the
packed engine runs it, for the classification token only, in the dense model too. Latency is processor time of one
thread unless told otherwise: other users of the machine count less.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kept_tokens import run_packed, run_test_part
from latency_rounds import (
    Batch,
    Runner,
    add_options,
    in_turns,
    latency_rows,
    print_latency,
    runner,
    timed_batches,
)
from lightning.pytorch import Callback, seed_everything
from recipe import LEARNING_RATE, TASKS, data_of, fit, header, load_model, save
from rich.console import Console
from rich.table import Table
from rows import append, rows_in, sweep_missing, train_missing
from torch import nn

import lightning_compress
from lightning_compress.callbacks import BottleneckTokenDropping, ContributionTokenDropping
from lightning_compress.data import TextClassificationData
from lightning_compress.runtime import packed_encoder

MODELS = Path("runs") / "benchmarks" / "token_dropping"
RESULTS, DIAL = "token_dropping.jsonl", "token_dropping_dial.jsonl"
LATENCY = "token_dropping_latency.jsonl"

VARIANTS: dict[str, Callable[[], Callback] | None] = {
    "base": None,
    "dense": None,
    **{
        f"flops{percent}": lambda percent=percent: ContributionTokenDropping(
            target_flops=percent / 100, warmup=0.0
        )
        for percent in (10, 15, 20, 25, 33, 40, 50, 66, 80)
    },
    **{
        f"bottleneck{percent}": lambda percent=percent: BottleneckTokenDropping(
            target_flops=percent / 100, warmup=0.0
        )
        for percent in (15, 25, 33, 50, 66)
    },
    **{
        f"narrow{percent}": lambda percent=percent: BottleneckTokenDropping(
            target_flops=percent / 100, warmup=0.0, sampler_width=64
        )
        for percent in (33, 50)
    },
    "norm50": lambda: BottleneckTokenDropping(target_flops=0.5, warmup=0.0, entropy_weight=0.0),
    "entropy50": lambda: BottleneckTokenDropping(target_flops=0.5, warmup=0.0, removal_weight=0.0),
    "skim50": lambda: BottleneckTokenDropping(target_flops=0.5, warmup=0.0, objective="skim"),
    "encoder50": lambda: ContributionTokenDropping(target_flops=0.5, warmup=0.0, saliency_to_encoder=True),
    "self50": lambda: ContributionTokenDropping(target_flops=0.5),
    "nosaliency50": lambda: ContributionTokenDropping(target_flops=0.5, warmup=0.0, saliency_weight=0.0),
}


def folder_of(name: str, variant: str, seed: int) -> Path:
    """Return where the model of a run is kept."""
    return MODELS / f"{name}-{variant}-{seed}"


def train(name: str, variant: str, seed: int) -> dict[str, Any]:
    """Run one training and return its row; the trained model is saved under ``runs/``."""
    seed_everything(seed)
    make = VARIANTS[variant]
    start = "minilm" if variant == "base" else str(folder_of(name, "base", seed))
    done = fit(name, [] if make is None else [make()], start)
    save(done.model, done.data, folder_of(name, variant, seed))
    return {**header(name, variant, seed), **done.fields(), **evaluate(done.model, done.data)}


def evaluate(model: Any, data: TextClassificationData) -> dict[str, Any]:
    """Return accuracy, FLOPs against dense and kept tokens on the test part, run packed, in bf16 autocast."""
    run = run_test_part(model, data)
    return {
        "accuracy": run.accuracy,
        "texts": run.texts,
        "tokens_per_text": round(float(run.lengths_B.float().mean()), 1),
        **run.speedups(model),
        "kept": [round(float(share), 4) for share in run.kept_BL.sum(dim=0) / run.lengths_B.sum()],
    }


def dial(name: str, variant: str, seed: int, scales: list[float]) -> Iterator[dict[str, Any]]:
    """Evaluate a trained model with its thresholds scaled, without training."""
    model, data = load_model(folder_of(name, variant, seed)), data_of(name)
    encoder: Any = packed_encoder(model)
    trained = float(encoder.policy.scale)
    for scale in scales:
        encoder.policy.scale.fill_(trained * scale)
        yield {**header(name, variant, seed), "dial": scale, **evaluate(model, data)}


def run_training(tasks: list[str], variants: list[str], seeds: list[int]) -> None:
    """Run what is missing."""
    for row in train_missing(RESULTS, tasks, variants, seeds, train):
        key = (row["task"], row["variant"], row["seed"])
        print(f"{key}: accuracy {row['accuracy']:.4f} speed-up {row['speedup']:.2f}", flush=True)


def run_evaluation(tasks: list[str], variants: list[str]) -> None:
    """Add rows of models that are there already, e.g. dense ones that another benchmark trained by the same recipe."""
    for name in tasks:
        for variant in variants:
            row = {
                **header(name, variant, 0),
                "learning_rate": LEARNING_RATE,
                "fit_seconds": None,
                "step_seconds": None,
                "later_step_seconds": None,
                **evaluate(load_model(folder_of(name, variant, 0)), data_of(name)),
            }
            append(RESULTS, row)
            print(f"{name} {variant}: accuracy {row['accuracy']:.4f}", flush=True)


def run_dial(tasks: list[str], variants: list[str], scales: list[float]) -> None:
    """Sweep what is missing."""
    for row in sweep_missing(DIAL, "dial", tasks, variants, scales, dial):
        print(
            f"{row['task']} {row['variant']} x{row['dial']}: {row['accuracy']:.4f} {row['speedup']:.2f}",
            flush=True,
        )


def run_latency(
    name: str, variants: list[str], batch_sizes: list[int], rounds: int, texts: int, clock: str
) -> None:
    """Time the test texts, batch by batch as they come, through every rival in turns; ratios are formed per round."""
    for batch_size in batch_sizes:
        batches = timed_batches(name, batch_size, texts)
        rivals = _rivals(name, variants)
        flops = {
            key: run_packed(model, batches).speedup(model, None, "first")
            for key, (_, model) in rivals.items()
            if model is not None
        }
        samples = in_turns({key: run for key, (run, _) in rivals.items()}, batches, rounds, clock)
        for row in latency_rows(name, batch_size, batches, clock, samples, flops, fill=_fill(batches)):
            append(LATENCY, row)
        print_latency(name, batch_size, samples, flops)


def _rivals(name: str, variants: list[str]) -> dict[str, tuple[Runner, Any]]:
    dense = load_model(folder_of(name, "dense", 0))
    rivals: dict[str, tuple[Runner, Any]] = {}
    for suffix, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain = copy.deepcopy(dense).to(dtype)
        rivals[f"dense {suffix}"] = (runner(plain), None)
        rivals[f"dense, sorted {suffix}"] = (_sorted_runner(plain), None)
        packed = lightning_compress.pack(copy.deepcopy(dense)).to(dtype)
        rivals[f"packed {suffix}"] = (runner(packed), packed)
        for variant in variants:
            model = load_model(folder_of(name, variant, 0)).to(dtype)
            rivals[f"{variant} {suffix}"] = (runner(model), model)
    onnx = _onnx_runner(dense)
    if onnx is not None:
        rivals["onnxruntime int8"] = (onnx, None)
    return rivals


def _sorted_runner(model: nn.Module) -> Runner:
    run = runner(model)
    return lambda batches: run(_sorted(batches))


def _sorted(batches: list[Batch]) -> list[Batch]:
    """Return the same texts, in batches of similar length."""
    rows = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]
    rows.sort(key=lambda row: int(row["attention_mask"].sum()))
    size = len(batches[0]["input_ids"])
    out = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(int(row["attention_mask"].sum()) for row in part)
        padded = {k: [torch.nn.functional.pad(r[k], (0, width))[:width] for r in part] for k in part[0]}
        out.append({k: torch.stack(v) for k, v in padded.items()})
    return out


def _onnx_runner(model: Any) -> Runner | None:
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
        from onnxruntime.quantization import quantize_dynamic  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = tuple(torch.ones(2, 16, dtype=torch.long) for _ in names)
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        axes = {name: {0: "batch", 1: "tokens"} for name in names}
        torch.onnx.export(
            copy.deepcopy(model).float(), example, str(plain), input_names=names, output_names=["logits"],
            dynamic_axes=axes, dynamo=False,
        )  # fmt: skip
        quantize_dynamic(plain, small)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            small.read_bytes(), options, providers=["CPUExecutionProvider"]
        )

    def run(batches: list[Batch]) -> None:
        for batch in batches:
            session.run(None, {name: batch[name].numpy() for name in names})

    return run


def _fill(batches: list[Batch]) -> float:
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return round(real / sum(batch["attention_mask"].numel() for batch in batches), 3)


def print_table() -> None:
    """Print all rows, each against the dense run of the same data set and seed."""
    rows = rows_in(RESULTS)
    dense = {(r["task"], r["seed"]): r for r in rows if r["variant"] == "dense"}
    table = Table(
        "data", "variant", "seed", "steps", "accuracy", "vs dense", "FLOPs", "run", "kept", "s/step"
    )
    for row in sorted(rows, key=lambda r: (r["task"], r["variant"], r["seed"])):
        base = dense.get((row["task"], row["seed"]))
        against = f"{100 * (row['accuracy'] - base['accuracy']):+.2f}" if base else ""
        kept = " ".join(f"{share:.2f}" for share in row["kept"])
        table.add_row(
            row["task"], row["variant"], str(row["seed"]), str(row["steps"]), f"{100 * row['accuracy']:.2f}",
            against, f"{row['speedup']:.2f}", f"{row['speedup_run']:.2f}", kept, str(row["step_seconds"] or ""),
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("train", "evaluate", "dial", "latency"):
        sub = commands.add_parser(command)
        sub.add_argument("--tasks", nargs="+", default=["sst2"], choices=TASKS)
        sub.add_argument("--variants", nargs="+", default=["flops50"], choices=VARIANTS)
    commands.choices["train"].add_argument("--seeds", nargs="+", type=int, default=[0])
    commands.choices["dial"].add_argument(
        "--scales", nargs="+", type=float, default=[0.8, 0.9, 1.1, 1.25, 1.5]
    )
    add_options(commands.choices["latency"])
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "train":
        run_training(args.tasks, args.variants, args.seeds)
    elif args.command == "evaluate":
        run_evaluation(args.tasks, args.variants)
    elif args.command == "dial":
        run_dial(args.tasks, args.variants, args.scales)
    elif args.command == "latency":
        torch.set_num_threads(args.threads)
        for name in args.tasks:
            run_latency(name, args.variants, args.batch_sizes, args.rounds, args.texts, args.clock)
    else:
        print_table()


if __name__ == "__main__":
    main()
