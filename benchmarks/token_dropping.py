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
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from recipe import (
    LEARNING_RATE,
    TASKS,
    StepClock,
    append,
    data_of,
    header,
    load_model,
    rows_in,
    save,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_compress
from lightning_compress.callbacks import BottleneckTokenDropping, ContributionTokenDropping
from lightning_compress.data import TextClassificationData
from lightning_compress.nn.kept_flops import DroppingCosts, LastLayer
from lightning_compress.runtime import packed_encoder
from lightning_compress.tasks import TextClassifier

MODELS = Path("runs") / "benchmarks" / "token_dropping"


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
    make, clock = VARIANTS[variant], StepClock()
    trainer = Trainer(
        accelerator="cpu", precision="bf16-mixed", max_steps=TASKS[name].steps, gradient_clip_val=1.0,
        callbacks=[clock, *([] if make is None else [make()])], logger=False, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, enable_progress_bar=False,
    )  # fmt: skip
    start = "minilm" if variant == "base" else str(folder_of(name, "base", seed))
    module, data = TextClassifier(start, learning_rate=LEARNING_RATE), data_of(name)
    begun = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - begun
    model = module.model
    assert model is not None
    save(model, data, folder_of(name, variant, seed))
    return {
        **header(name, variant, seed),
        "learning_rate": LEARNING_RATE,
        "fit_seconds": round(seconds, 1),
        "step_seconds": clock.median(first_epoch=True),
        "later_step_seconds": clock.median(first_epoch=False),
        **evaluate(model, data),
    }


def evaluate(model: Any, data: TextClassificationData, limit: int | None = None) -> dict[str, Any]:
    """Return accuracy, FLOPs against dense and kept tokens on the test part, run packed, in bf16 autocast."""
    data.prepare_data()
    data.setup("test")
    model = lightning_compress.pack(model).eval()
    encoder = packed_encoder(model)
    assert encoder is not None
    right, kept, lengths = 0, [], []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for index, batch in enumerate(data.test_dataloader()):
            if limit is not None and index >= limit:
                break
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
            kept.append(torch.stack([segments.lengths_B for segments in encoder.latest], dim=1))
            lengths.append(batch["attention_mask"].sum(dim=1))
    kept_BL, lengths_B = torch.cat(kept), torch.cat(lengths)
    return {
        "accuracy": right / len(lengths_B),
        "texts": len(lengths_B),
        "tokens_per_text": round(float(lengths_B.float().mean()), 1),
        "speedup": flops_speedup(model, kept_BL, lengths_B, "all"),
        "speedup_run": flops_speedup(model, kept_BL, lengths_B, "first"),
        "kept": [round(float(share), 4) for share in kept_BL.sum(dim=0) / lengths_B.sum()],
    }


def flops_speedup(model: nn.Module, kept_BL: Tensor, lengths_B: Tensor, last_layer: LastLayer) -> float:
    """Return dense over compressed FLOPs, the ratio of totals."""
    all_BL = lengths_B[:, None].expand_as(kept_BL)
    dense = DroppingCosts.of(model, policy_flops_per_token=0, exit_flops=0, last_layer=last_layer).flops(
        all_BL, lengths_B
    )
    compressed = DroppingCosts.of(model, last_layer=last_layer).flops(kept_BL, lengths_B)
    return round(float(dense.sum() / compressed.sum()), 4)


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
    for name in tasks:
        for seed in seeds:
            for variant in variants:
                key = (name, variant, seed)
                if any((r["task"], r["variant"], r["seed"]) == key for r in rows_in("token_dropping.jsonl")):
                    continue
                row = train(name, variant, seed)
                append("token_dropping.jsonl", row)
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
            append("token_dropping.jsonl", row)
            print(f"{name} {variant}: accuracy {row['accuracy']:.4f}", flush=True)


def run_dial(tasks: list[str], variants: list[str], scales: list[float]) -> None:
    """Sweep what is missing."""
    for name in tasks:
        for variant in variants:
            done = {(r["task"], r["variant"], r["dial"]) for r in rows_in("token_dropping_dial.jsonl")}
            left = [scale for scale in scales if (name, variant, scale) not in done]
            for row in dial(name, variant, 0, left) if left else ():
                append("token_dropping_dial.jsonl", row)
                print(
                    f"{name} {variant} x{row['dial']}: {row['accuracy']:.4f} {row['speedup']:.2f}", flush=True
                )


Runner = Callable[[list[dict[str, Tensor]]], None]


def run_latency(
    name: str, variants: list[str], batch_sizes: list[int], rounds: int, texts: int, clock: str
) -> None:
    """Time the test texts, batch by batch as they come, through every rival in turns; ratios are formed per round."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    for batch_size in batch_sizes:
        batches = _batches(name, batch_size, min(texts, 24 if batch_size == 1 else texts))
        rivals = _rivals(name, variants)
        flops = {key: _flops_of(model, batches) for key, (_, model) in rivals.items() if model is not None}
        for run, _ in rivals.values():
            run(batches[:1])
        samples: dict[str, list[float]] = {key: [] for key in rivals}
        order = list(rivals)
        for index in range(rounds):
            for key in order[index % len(order) :] + order[: index % len(order)]:
                begun = now()
                rivals[key][0](batches)
                samples[key].append(now() - begun)
        for key, seconds in samples.items():
            append(
                "token_dropping_latency.jsonl",
                {
                    **header(name, key, 0),
                    "batch_size": batch_size,
                    "texts": sum(len(batch["input_ids"]) for batch in batches),
                    "fill": _fill(batches),
                    "threads": torch.get_num_threads(),
                    "clock": clock,
                    "median_seconds": statistics.median(seconds),
                    "seconds": [round(s, 5) for s in seconds],
                    "flops_speedup_run": flops.get(key),
                },
            )
        _print_latency(name, batch_size, samples, flops)


def _batches(name: str, batch_size: int, texts: int) -> list[dict[str, Tensor]]:
    data = data_of(name, batch_size, bucket=False)
    data.prepare_data()
    data.setup("test")
    batches = []
    for batch in data.test_dataloader():
        batches.append({key: value for key, value in batch.items() if key != "labels"})
        if sum(len(b["input_ids"]) for b in batches) >= texts:
            break
    return batches


def _rivals(name: str, variants: list[str]) -> dict[str, tuple[Runner, Any]]:
    dense = load_model(folder_of(name, "dense", 0))
    rivals: dict[str, tuple[Runner, Any]] = {}
    for suffix, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        plain = copy.deepcopy(dense).to(dtype)
        rivals[f"dense {suffix}"] = (_torch_runner(plain), None)
        rivals[f"dense, sorted {suffix}"] = (_torch_runner(plain, is_sorted=True), None)
        packed = lightning_compress.pack(copy.deepcopy(dense)).to(dtype)
        rivals[f"packed {suffix}"] = (_torch_runner(packed), packed)
        for variant in variants:
            model = load_model(folder_of(name, variant, 0)).to(dtype)
            rivals[f"{variant} {suffix}"] = (_torch_runner(model), model)
    onnx = _onnx_runner(dense)
    if onnx is not None:
        rivals["onnxruntime int8"] = (onnx, None)
    return rivals


def _torch_runner(model: nn.Module, is_sorted: bool = False) -> Runner:
    def run(batches: list[dict[str, Tensor]]) -> None:
        with torch.inference_mode():
            for batch in _sorted(batches) if is_sorted else batches:
                model(**batch)

    return run


def _sorted(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
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

    def run(batches: list[dict[str, Tensor]]) -> None:
        for batch in batches:
            session.run(None, {name: batch[name].numpy() for name in names})

    return run


def _flops_of(model: Any, batches: list[dict[str, Tensor]]) -> float:
    encoder: Any = packed_encoder(model)
    kept, lengths = [], []
    with torch.inference_mode():
        for batch in batches:
            model(**batch)
            kept.append(torch.stack([segments.lengths_B for segments in encoder.latest], dim=1))
            lengths.append(batch["attention_mask"].sum(dim=1))
    return flops_speedup(model, torch.cat(kept), torch.cat(lengths), "first")


def _fill(batches: list[dict[str, Tensor]]) -> float:
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return round(real / sum(batch["attention_mask"].numel() for batch in batches), 3)


def _print_latency(
    name: str, batch_size: int, samples: dict[str, list[float]], flops: dict[str, float]
) -> None:
    table = Table("model", "ms", "x dense fp32", "x dense bf16", "FLOPs", title=f"{name}, batch {batch_size}")
    for key, seconds in samples.items():
        ratios = [
            statistics.median(a / b for a, b in zip(samples[rival], seconds, strict=True))
            for rival in ("dense fp32", "dense bf16")
        ]
        flop = f"{flops[key]:.2f}" if key in flops else ""
        table.add_row(key, f"{1e3 * statistics.median(seconds):.1f}", *(f"{r:.2f}" for r in ratios), flop)
    Console().print(table)


def print_table() -> None:
    """Print all rows, each against the dense run of the same data set and seed."""
    rows = rows_in("token_dropping.jsonl")
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
    commands.choices["latency"].add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    commands.choices["latency"].add_argument("--rounds", type=int, default=9)
    commands.choices["latency"].add_argument("--texts", type=int, default=96)
    commands.choices["latency"].add_argument("--threads", type=int, default=1)
    commands.choices["latency"].add_argument("--clock", choices=("wall", "cpu"), default="cpu")
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
