"""Fine-tune narrow models and models with exits by one recipe, and append what came out to a results file.

Every row is one run: a data set, a variant, a seed. All start from the fine-tuned ``base`` of
``benchmarks/token_dropping.py train`` and get the same number of steps; the teacher, where there is one, is that
command's ``dense`` model. Runs that the results file already holds are skipped, so the command can be stopped and
started again. Data are looked for in the folder named by LIGHTNING_COMPRESS_DATA.

    python benchmarks/token_dropping.py train --tasks sst2 --variants base dense
    python benchmarks/slender.py train --tasks sst2 --variants slim50 mean both50
    python benchmarks/slender.py curve --tasks sst2 --variants mean both50
    python benchmarks/slender.py latency --tasks sst2 --variants slim50 mean
    python benchmarks/slender.py table
    python benchmarks/slender.py frontier --share 0.965

``curve`` lets more and more texts leave trained models with exits, without training. FLOPs are 2 MACs over unpadded
tokens, the ratio of totals over the test part, exits included; ``speedup`` prices the last layer in full,
``speedup_run`` as the packed engine runs it, for the classification token only, in the dense model too. ``latency``
times whole data, as texts come, in processor time of one thread unless told otherwise, with thresholds chosen on
validation data for ``--max-drop``; ``waiting`` is a model with exits whose whole batch waits for its last text.

Numbers in names of variants are percents of the layers' parameters. ``mean``: exits of the default kind; ``exits``:
those that read the first token; ``both`` and ``joint``: the same with slimming; ``later``: exits added to a finished
``slim``; ``long``: like ``both``, twice the steps; ``student``: fewer layers instead.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
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
from recipe import TASKS, data_of, fit, header, load_model, save
from rich.console import Console
from rich.table import Table
from rows import append, rows_in, sweep_missing, train_missing
from torch import Tensor, nn

import lightning_compress
from lightning_compress.callbacks import (
    ContributionTokenDropping,
    Distillation,
    MultiExit,
    SoftThresholdRank,
    WidthSlimming,
)
from lightning_compress.data import TextClassificationData
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import get_module
from lightning_compress.runtime import packed_encoder

FOLDER = Path("runs") / "benchmarks"
RESULTS, CURVE, LATENCY = "slender.jsonl", "slender_curve.jsonl", "slender_latency.jsonl"
THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.68)

Variant = Callable[[str], list[Callback]]
"""From the folder of the teacher to callbacks."""


def _distilled(*methods: Callable[[], Callback], **settings: Any) -> Variant:
    return lambda teacher: [*(method() for method in methods), Distillation(teacher=teacher, **settings)]


def _exits(**settings: Any) -> Callable[[], Callback]:
    """Exits that learn from labels and from the teacher, not from the model's own head."""
    return partial(MultiExit, final_weight=0.0, **settings)


def _slim(percent: int, **settings: Any) -> Callable[[], Callback]:
    return partial(WidthSlimming, target_params=percent / 100, **settings)


def _everywhere(share: float) -> Callable[[], Callback]:
    """The same share of heads, neurons and the residual stream."""
    return partial(WidthSlimming, heads=share, ffn=share, hidden=share)


VARIANTS: dict[str, Variant] = {
    "distilled": _distilled(),
    "student3": _distilled(),
    "student2": _distilled(),
    "exits": _distilled(_exits(pooling="cls")),
    "mean": _distilled(_exits()),
    "exits_alone": lambda _: [MultiExit()],
    "sums": _distilled(_exits(equilibrium=False)),
    "pooler": _distilled(_exits(pooling="cls", pooler=True)),
    **{f"slim{p}": _distilled(_slim(p)) for p in (75, 50, 33, 25, 12)},
    **{f"undistilled{p}": lambda _, p=p: [_slim(p)()] for p in (50, 25)},
    **{f"joint{p}": _distilled(_slim(p), _exits(pooling="cls")) for p in (50, 25)},
    **{f"both{p}": _distilled(_slim(p), _exits()) for p in (75, 50, 33, 25, 12)},
    "calibrated50": _distilled(_slim(50, calibration_batches=16), _exits()),
    "uncalibrated50": _distilled(_slim(50, calibration_batches=16, importance_from="final_exit"), _exits()),
    **{f"later{p}": _distilled(_exits()) for p in (50, 25)},
    **{f"long{p}": _distilled(_slim(p), _exits()) for p in (50, 25, 12)},
    **{f"group{p}": _distilled(_slim(p, criterion="group_taylor")) for p in (50, 25)},
    **{f"global{p}": _distilled(_slim(p, ranking="global")) for p in (50, 25)},
    **{f"l0_{p}": _distilled(_slim(p, criterion="l0")) for p in (50, 25)},
    **{f"hidden{p}": _distilled(_everywhere(p / 100), hidden_weight=0.0) for p in (75, 50)},
    "everything": _distilled(
        _slim(50),
        partial(SoftThresholdRank, target_params=0.75),
        partial(ContributionTokenDropping, target_flops=0.33, warmup=0.1),
        _exits(),
        hidden_weight=0.0,
    ),
}
LONG = 2
"""``long`` variants get so many times the steps: as many as a slim model and exits ``later`` get together."""
DEPTHS = {"student3": (0, 2, 4), "student2": (0, 3)}
"""Layers that a shorter student starts with."""


def folder_of(name: str, variant: str, seed: int) -> Path:
    """Return where the model of a run is kept; those of the recipe are shared with the other benchmark."""
    kind = "token_dropping" if variant in ("base", "dense") else "slender"
    return FOLDER / kind / f"{name}-{variant}-{seed}"


def start_of(name: str, variant: str, seed: int) -> str:
    """Return the folder of the model that a run starts from."""
    if variant.startswith("later"):
        return str(folder_of(name, variant.replace("later", "slim"), seed))
    if variant not in DEPTHS:
        return str(folder_of(name, "base", seed))
    model, kept = load_model(folder_of(name, "base", seed)), DEPTHS[variant]
    layers: Any = get_module(model, f"{describe(model).encoder}.layer")
    folder = FOLDER / "slender" / f"{name}-{variant}-start-{seed}"
    encoder: Any = get_module(model, str(describe(model).encoder))
    encoder.layer = nn.ModuleList(layers[index] for index in kept)
    model.config.num_hidden_layers = len(kept)
    save(model, data_of(name), folder)
    return str(folder)


def train(name: str, variant: str, seed: int) -> dict[str, Any]:
    """Run one training and return its row; the trained model is saved under ``runs/``."""
    seed_everything(seed)
    callbacks = VARIANTS[variant](str(folder_of(name, "dense", seed)))
    steps = TASKS[name].steps * (LONG if variant.startswith("long") else 1)
    done = fit(name, callbacks, start_of(name, variant, seed), steps)
    save(done.model, done.data, folder_of(name, variant, seed))
    dense = load_model(folder_of(name, "dense", seed))
    return {
        **header(name, variant, seed, steps),
        **done.fields(),
        **sizes(done.model, dense),
        **evaluate(done.model, done.data, dense),
    }


def sizes(model: Any, dense: Any) -> dict[str, float]:
    """Return how many times fewer parameters the layers and the whole model have, exits included."""
    layers, whole = _parameters(model), _parameters(dense)
    return {scope: round(whole[scope] / layers[scope], 3) for scope in ("layers_smaller", "model_smaller")}


def _parameters(model: Any) -> dict[str, int]:
    layers = [get_module(model, layer.path) for layer in describe(model).layers]
    return {
        "layers_smaller": sum(p.numel() for layer in layers for p in layer.parameters()),
        "model_smaller": sum(p.numel() for p in model.parameters()),
    }


def evaluate(model: Any, data: TextClassificationData, dense: Any) -> dict[str, Any]:
    """Return accuracy, FLOPs against dense, and how deep texts went, on the test part, run packed, in bf16 autocast."""
    run = run_test_part(model, data)
    is_there_BL = run.kept_BL > 0
    return {
        "accuracy": run.accuracy,
        "texts": run.texts,
        **run.speedups(model, dense),
        "depth": round(float(is_there_BL.sum(dim=1).float().mean()), 3),
        "leaves": [round(float(x), 4) for x in is_there_BL.float().mean(dim=0)],
    }


def curve(name: str, variant: str, seed: int, thresholds: list[float]) -> Iterator[dict[str, Any]]:
    """Evaluate a trained model with exits at thresholds of the entropy, without training."""
    model, data = load_model(folder_of(name, variant, seed)), data_of(name)
    dense = load_model(folder_of(name, "dense", seed))
    for threshold in thresholds:
        lightning_compress.set_exit_threshold(model, threshold)
        yield {**header(name, variant, seed), "threshold": threshold, **evaluate(model, data, dense)}


def run_training(tasks: list[str], variants: list[str], seeds: list[int]) -> None:
    """Run what is missing."""
    for row in train_missing(RESULTS, tasks, variants, seeds, train):
        print(
            f"{(row['task'], row['variant'], row['seed'])}: accuracy {row['accuracy']:.4f} "
            f"FLOPs {row['speedup']:.2f}x layers {row['layers_smaller']:.2f}x smaller",
            flush=True,
        )


def run_curve(tasks: list[str], variants: list[str], thresholds: list[float]) -> None:
    """Evaluate what is missing."""
    for row in sweep_missing(CURVE, "threshold", tasks, variants, thresholds, curve):
        print(
            f"{row['task']} {row['variant']} below {row['threshold']}: {row['accuracy']:.4f} "
            f"{row['speedup']:.2f}x depth {row['depth']:.2f}",
            flush=True,
        )


def run_latency(
    name: str, variants: list[str], batch_sizes: list[int], rounds: int, texts: int, clock: str, drop: float
) -> None:
    """Time the test texts, batch by batch as they come, through every rival in turns; ratios are formed per round."""
    for batch_size in batch_sizes:
        batches = timed_batches(name, batch_size, texts)
        samples = in_turns(_rivals(name, variants, drop), batches, rounds, clock)
        flops: dict[str, float] = {}
        for variant in variants:
            flops |= dict.fromkeys(
                (f"{variant} fp32", f"{variant} bf16"), _flops_of(name, variant, batches, drop)
            )
        for row in latency_rows(name, batch_size, batches, clock, samples, flops, max_drop=drop):
            append(LATENCY, row)
        print_latency(name, batch_size, samples, flops)


def _opened(name: str, variant: str, drop: float) -> Any:
    """Open a model; one with exits as fast as the allowed drop of its score on validation data lets it be."""
    model = load_model(folder_of(name, variant, 0))
    encoder = packed_encoder(model)
    if encoder is not None and encoder.exits is not None:
        data = data_of(name)
        data.prepare_data()
        data.setup("validate")
        batches: Any = data.val_dataloader()
        lightning_compress.choose_exit_threshold(model, batches, max_drop=drop)
    return model


def _rivals(name: str, variants: list[str], drop: float) -> dict[str, Runner]:
    rivals: dict[str, Runner] = {}
    for suffix, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rivals[f"dense {suffix}"] = runner(load_model(folder_of(name, "dense", 0)).to(dtype))
        rivals[f"packed {suffix}"] = runner(
            lightning_compress.pack(load_model(folder_of(name, "dense", 0))).to(dtype)
        )
        for variant in variants:
            model = _opened(name, variant, drop).to(dtype)
            rivals[f"{variant} {suffix}"] = runner(lightning_compress.pack(model))
            if getattr(packed_encoder(model), "exits", None) is not None:
                rivals[f"{variant}, waiting {suffix}"] = runner(_waiting(copy.deepcopy(model)))
    return rivals


def _waiting(model: nn.Module) -> nn.Module:
    """Let nobody leave before the whole batch may."""
    encoder: Any = packed_encoder(model)
    rule = encoder.exits.rule
    leaves = rule.leaves

    def together(*args: Any) -> Tensor:
        leaving_B = leaves(*args)
        return leaving_B if bool(leaving_B.all()) else torch.zeros_like(leaving_B)

    rule.leaves = together
    return model


def _flops_of(name: str, variant: str, batches: list[Batch], drop: float) -> float:
    model = lightning_compress.pack(_opened(name, variant, drop)).eval()
    return run_packed(model, batches).speedup(model, load_model(folder_of(name, "dense", 0)), "first")


def print_table() -> None:
    """Print all rows, each against the dense run of the same data set and seed."""
    dense, size = _dense_accuracy(), _sizes()
    table = Table(
        "data", "variant", "threshold", "accuracy", "vs dense", "FLOPs", "run", "layers", "model", "depth"
    )
    for row in sorted(_all_rows(), key=lambda r: (*_key(r), r.get("threshold", 0.0))):
        base = dense.get((row["task"], row["seed"]))
        table.add_row(
            row["task"], row["variant"], str(row.get("threshold", "")), f"{100 * row['accuracy']:.2f}",
            "" if base is None else f"{100 * (row['accuracy'] - base):+.2f}",
            f"{row['speedup']:.2f}", f"{row['speedup_run']:.2f}", *size[_key(row)], f"{row['depth']:.2f}",
        )  # fmt: skip
    Console().print(table)


def print_frontier(share: float) -> None:
    """Print the fewest FLOPs, by data set and kind of variant, that keep a share of the dense accuracy."""
    dense, size = _dense_accuracy(), _sizes()
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _all_rows():
        if row["accuracy"] >= share * dense[row["task"], row["seed"]]:
            kept.setdefault((row["task"], row["variant"].rstrip("0123456789_")), []).append(row)
    table = Table(
        "data", "kind", "variant", "threshold", "accuracy", "FLOPs", "layers", "model",
        title=f"fewest FLOPs at {100 * share:.1f} % of the dense accuracy",
    )  # fmt: skip
    for (task, kind), rows in sorted(kept.items()):
        row = max(rows, key=lambda r: r["speedup"])
        table.add_row(
            task, kind, row["variant"], str(row.get("threshold", "")), f"{100 * row['accuracy']:.2f}",
            f"{row['speedup']:.2f}", *size[_key(row)],
        )  # fmt: skip
    Console().print(table)


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["task"], row["variant"], row["seed"]


def _all_rows() -> list[dict[str, Any]]:
    return [*rows_in(RESULTS), *rows_in(CURVE)]


def _dense_accuracy() -> dict[tuple[str, int], float]:
    rows = rows_in("token_dropping.jsonl")
    return {(row["task"], row["seed"]): row["accuracy"] for row in rows if row["variant"] == "dense"}


def _sizes() -> dict[tuple[str, str, int], list[str]]:
    """How many times fewer parameters the layers and the model of each run have."""
    scopes = ("layers_smaller", "model_smaller")
    return {_key(row): [f"{row[scope]:.2f}" for scope in scopes] for row in rows_in(RESULTS)}


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("train", "curve", "latency"):
        sub = commands.add_parser(command)
        sub.add_argument("--tasks", nargs="+", default=["sst2"], choices=TASKS)
        sub.add_argument("--variants", nargs="+", default=["mean"], choices=VARIANTS)
    commands.choices["train"].add_argument("--seeds", nargs="+", type=int, default=[0])
    commands.choices["curve"].add_argument("--thresholds", nargs="+", type=float, default=list(THRESHOLDS))
    latency = commands.choices["latency"]
    add_options(latency)
    latency.add_argument("--max-drop", type=float, default=0.01)
    commands.add_parser("table")
    commands.add_parser("frontier").add_argument("--share", type=float, default=0.965)
    args = parser.parse_args()
    if args.command == "train":
        run_training(args.tasks, args.variants, args.seeds)
    elif args.command == "curve":
        run_curve(args.tasks, args.variants, args.thresholds)
    elif args.command == "latency":
        torch.set_num_threads(args.threads)
        for name in args.tasks:
            run_latency(
                name, args.variants, args.batch_sizes, args.rounds, args.texts, args.clock, args.max_drop
            )
    elif args.command == "table":
        print_table()
    else:
        print_frontier(args.share)


if __name__ == "__main__":
    main()
