"""What blocks of few bits cost in accuracy and save on disk: without training, operator by operator, and trained for.

The models are the dense ones that ``benchmarks/token_dropping.py train --variants base dense`` kept; data are found as
it finds them. Rows that the results file already holds are skipped, so the command can be stopped and started again.

    python benchmarks/quantization.py evaluate --tasks sst2 ag_news mrpc imdb --presets w8a8 w4a8 w4a4 w8
    python benchmarks/quantization.py sensitivity --tasks sst2 mrpc --presets w8a8 w4a4
    python benchmarks/quantization.py storage
    python benchmarks/quantization.py train --tasks sst2 --presets w4a4 --steps 300
    python benchmarks/quantization.py table
    python benchmarks/quantization.py figure

``evaluate`` rounds a model and trains nothing. ``--blocks`` are ``row`` (a factor per row), ``layer`` (one factor for a
whole matrix) or ``ROWSxCOLUMNS``; ``--presets w4a8e8`` has tables of 8 bits beside ``w4a8``. Compared is the packed
model in fp32 with the integer reference on the same texts; ``--limit`` takes so many, spread evenly over the test part,
and each row tells how many they were. ``lost`` and ``gained`` count the texts that the dense model answers right and
the quantised one does not, and the other way round. ``--calibration 16`` rounds weights for so many training batches.
``train`` fine-tunes the dense model for some steps more: seeing the rounding from the start and in full from the middle
(``qat``), in full from a tenth of the steps on (``early``), or not at all until it ends (``after``).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from latency_rounds import Batch, batches_of
from lightning.pytorch import seed_everything
from quantization_figure import draw_sensitivity
from recipe import TASKS, data_of, fit, header, load_model
from rich.console import Console
from rich.table import Table
from rows import append, rows_in
from token_dropping import folder_of
from torch import Tensor, nn

import lightning_compress
from lightning_compress.callbacks import BlockQuantization
from lightning_compress.nn.packed_matrix import PackedMatrix

RESULTS, STORAGE = "quantization.jsonl", "quantization_storage.jsonl"
FIGURE = Path(__file__).parents[1] / "docs" / "methods" / "block_quantization_sensitivity.svg"
PRESETS = ("w8a8", "w4a8", "w4a4", "w8")
MIXED = ("w4a8e8",)
"""Presets with tables of so many bits."""
BLOCKS = ("row", "64x64", "32x32", "1x128", "1x32", "layer")
FACTORS = ("scale", "shift")
SINGLE = ("weight", "linear", "embedding", "attention", "softmax", "activation", "norm")
"""One operator at a time; ``weight`` is the linears' weights without their inputs."""
TRAININGS: dict[str, dict[str, Any]] = {
    "qat": {"start": 0.0},
    "early": {"start": 0.0, "ramp_end": 0.1},
    "after": {"start": 1.0},
}

_BATCH = 32

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One way to quantise a model."""

    preset: str
    block: str = "row"
    factor: str = "scale"
    operators: str = "all"
    training: str = "none"
    """``"none"``, or for so many steps more one of ``TRAININGS``."""
    calibration: int = 0
    """Batches of the training part that weights are rounded for."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``quantize`` and of the callback."""
        whole: Any = {"row": "row", "layer": (0, 0)}
        block = whole.get(self.block) or tuple(int(size) for size in self.block.split("x"))
        name, _, tables = self.preset.partition("e")
        common = {"block": block, "factor": self.factor, "bits": {"embedding": int(tables)} if tables else {}}
        if self.operators == "weight":
            return {
                **common,
                "preset": "w8",
                "operators": ("linear",),
                "bits": {"weight": int(self.preset[1])},
            }
        operators = "all" if self.operators == "all" else tuple(self.operators.split("+"))
        return {**common, "preset": name, "operators": operators}

    def __str__(self) -> str:
        words = [str(value) for name, value in asdict(self).items() if name != "calibration"]
        return " ".join([*words, f"calibrated {self.calibration}"] if self.calibration else words)


@dataclass(frozen=True)
class Texts:
    """The texts that all settings of a data set answer, and what the dense model says."""

    batches: list[Batch]
    label_B: Tensor
    dense_BC: Tensor

    @classmethod
    @cache
    def of(cls, task: str, limit: int | None) -> Texts:
        """Return them; the whole test part without a limit."""
        batches, labels = batches_of(task, _BATCH, None)
        count = len(batches) if limit is None else min(len(batches), -(-limit // _BATCH))
        taken = [index * len(batches) // count for index in range(count)]
        batches, labels = [batches[index] for index in taken], [labels[index] for index in taken]
        dense_BC = answers(load_model(folder_of(task, "dense", 0)), batches)
        return cls(batches, torch.cat(labels), dense_BC)

    def compare(self, logits_BC: Tensor) -> Row:
        """Return the fields of a row that tell what a model answers."""
        is_right_B, was_right_B = (logits.argmax(-1) == self.label_B for logits in (logits_BC, self.dense_BC))
        centred_BC = self.dense_BC - self.dense_BC.mean(0)
        error = (logits_BC - self.dense_BC).square().mean() / centred_BC.square().mean()
        return {
            "texts": len(self.label_B),
            "accuracy": round(float(is_right_B.float().mean()), 5),
            "dense_accuracy": round(float(was_right_B.float().mean()), 5),
            "lost": int((was_right_B & ~is_right_B).sum()),
            "gained": int((is_right_B & ~was_right_B).sum()),
            "changed": int((logits_BC.argmax(-1) != self.dense_BC.argmax(-1)).sum()),
            "logit_error": round(float(error.sqrt()), 5),
        }


def answers(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Return the logits of all texts, computed packed; the model is packed in place."""
    packed = lightning_compress.pack(model).eval()
    with torch.inference_mode():
        return torch.cat([packed(**batch).logits.float() for batch in batches])


def evaluate(task: str, setting: Setting, limit: int | None) -> Row:
    """Quantise the dense model, and return the row."""
    texts = Texts.of(task, limit)
    batches = calibration_batches(task, setting.calibration) if setting.calibration else None
    dense = load_model(folder_of(task, "dense", 0))
    model = lightning_compress.quantize(dense, **setting.arguments(), calibration=batches)
    return {**_header(task, setting, 0, limit), **texts.compare(answers(model, texts.batches))}


def calibration_batches(task: str, count: int) -> list[Batch]:
    """Return the first batches of the training part, in an order drawn by seed 0."""
    seed_everything(0, verbose=False)
    data = data_of(task)
    data.prepare_data()
    data.setup("fit")
    return list(itertools.islice(data.train_dataloader(), count))


def train(task: str, setting: Setting, limit: int | None, steps: int, seed: int) -> Row:
    """Fine-tune the dense model for some steps more, quantised in the end, and return the row."""
    seed_everything(seed)
    done = fit(
        task,
        [BlockQuantization(**setting.arguments(), **TRAININGS[setting.training])],
        str(folder_of(task, "dense", 0)),
        steps,
    )
    texts = Texts.of(task, limit)
    found = texts.compare(answers(done.model, texts.batches))
    return {**_header(task, setting, steps, limit), "seed": seed, **done.fields(), **found}


def _header(task: str, setting: Setting, steps: int, limit: int | None) -> Row:
    return {**header(task, str(setting), 0), "steps": steps, "limit": limit, **asdict(setting)}


def run_missing(tasks: list[str], settings: list[Setting], limit: int | None) -> None:
    """Evaluate what the results file does not hold, and append it row by row."""
    for task in tasks:
        for setting in settings:
            if not _is_there(task, setting, limit, steps=0, seed=0):
                _keep(evaluate(task, setting, limit))


def run_training(
    tasks: list[str], settings: list[Setting], limit: int | None, steps: int | None, seeds: list[int]
) -> None:
    """Train what the results file does not hold."""
    for task in tasks:
        for seed in seeds:
            for setting in settings:
                wanted = steps or TASKS[task].steps
                if not _is_there(task, setting, limit, wanted, seed):
                    _keep(train(task, setting, limit, wanted, seed))


def _is_there(task: str, setting: Setting, limit: int | None, steps: int, seed: int) -> bool:
    key = (task, str(setting), limit, steps, seed)
    return any((r["task"], r["variant"], r["limit"], r["steps"], r["seed"]) == key for r in rows_in(RESULTS))


def _keep(row: Row) -> None:
    append(RESULTS, row)
    drop = 100 * (row["dense_accuracy"] - row["accuracy"])
    print(
        f"{row['task']} {row['variant']}: {100 * row['accuracy']:.2f}, {drop:+.2f} lost, {row['changed']} of "
        f"{row['texts']} answers changed, logits off by {row['logit_error']:.3f}",
        flush=True,
    )


def storage(task: str, settings: list[Setting]) -> Iterator[Row]:
    """Yield what saved models take on disk, against fp32 and bf16."""
    dense = load_model(folder_of(task, "dense", 0))
    plain = {
        str(dtype)[6:]: _saved_bytes(copy.deepcopy(dense).to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    for setting in settings:
        model = lightning_compress.quantize(copy.deepcopy(dense), **setting.arguments())
        parts = [part for part in model.modules() if isinstance(part, PackedMatrix)]
        yield {
            **header(task, str(setting), 0),
            **asdict(setting),
            "bytes": _saved_bytes(model),
            "fp32_bytes": plain["float32"],
            "bf16_bytes": plain["bfloat16"],
            "matrix_bytes": sum(part.storage_bytes for part in parts),
            "matrix_fp32_bytes": sum(4 * part.kept_parameters for part in parts),
        }


def _saved_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        if lightning_compress.plan_of(model) is None:
            model.save_pretrained(folder)  # type: ignore[operator]
        else:
            lightning_compress.save_pretrained(model, folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def run_storage(task: str, settings: list[Setting]) -> None:
    """Append the rows, and print them."""
    table = Table(
        "preset", "block", "factor", "MB", "x fp32", "x bf16", "matrices x fp32", title=f"{task}, on disk"
    )
    for row in storage(task, settings):
        append(STORAGE, row)
        own, kept = row["bytes"], row["matrix_fp32_bytes"] / row["matrix_bytes"]
        ratios = (f"{row['fp32_bytes'] / own:.2f}", f"{row['bf16_bytes'] / own:.2f}", f"{kept:.3f}")
        table.add_row(row["preset"], row["block"], row["factor"], f"{own / 1e6:.1f}", *ratios)
    Console().print(table)


def print_table() -> None:
    """Print all rows by data set: points of accuracy lost, and of answers changed."""
    rows = rows_in(RESULTS)
    for task in dict.fromkeys(row["task"] for row in rows):
        table = Table(
            "setting", "steps", "texts", "dense", "accuracy", "lost", "changed", "logits", title=task
        )
        for row in sorted((r for r in rows if r["task"] == task), key=lambda r: r["variant"]):
            noise = 100 * (row["lost"] + row["gained"]) ** 0.5 / row["texts"]
            lost = 100 * (row["dense_accuracy"] - row["accuracy"])
            table.add_row(
                row["variant"], str(row["steps"] or ""), str(row["texts"]), f"{100 * row['dense_accuracy']:.2f}",
                f"{100 * row['accuracy']:.2f}", f"{lost:+.2f} ± {noise:.2f}",
                f"{100 * row['changed'] / row['texts']:.2f} %", f"{row['logit_error']:.3f}",
            )  # fmt: skip
        Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.command == "table":
        return print_table()
    if args.command == "figure":
        singles = [
            row for row in rows_in(RESULTS) if row["operators"] in SINGLE and row["training"] == "none"
        ]
        return print(draw_sensitivity(singles, SINGLE, args.output))
    operators = SINGLE if args.command == "sensitivity" else tuple(args.operators)
    trainings = tuple(args.training) if args.command == "train" else ("none",)
    settings = [
        Setting(preset, block, factor, operator, training, getattr(args, "calibration", 0))
        for operator in operators
        for block in args.blocks
        for factor in args.factors
        for preset in args.presets
        for training in trainings
        if not (preset == "w8" and operator in ("attention", "softmax", "activation", "norm"))
    ]
    if args.command == "storage":
        return run_storage(args.tasks[0], settings)
    if args.command == "train":
        return run_training(args.tasks, settings, args.limit, args.steps, args.seeds)
    return run_missing(args.tasks, settings, args.limit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults: dict[str, Any] = {
        "evaluate": {"presets": PRESETS, "blocks": BLOCKS, "factors": FACTORS, "operators": ("linear", "all")},
        "sensitivity": {"presets": ("w8a8", "w4a4"), "blocks": ("row",), "factors": ("scale",)},
        "storage": {"presets": PRESETS, "blocks": BLOCKS, "factors": FACTORS, "operators": ("linear+embedding",)},
        "train": {"presets": ("w4a4",), "blocks": ("row",), "factors": ("scale",), "operators": ("linear+embedding",)},
    }  # fmt: skip
    for command, given in defaults.items():
        sub = commands.add_parser(command)
        sub.add_argument("--tasks", nargs="+", default=["sst2"], choices=TASKS)
        for name, values in given.items():
            choices = {"presets": PRESETS + MIXED, "factors": FACTORS}.get(name)
            sub.add_argument(f"--{name}", nargs="+", default=list(values), choices=choices)
        if command != "storage":
            sub.add_argument(
                "--limit", type=int, help="texts to answer, spread over the test part; all by default"
            )
    commands.choices["evaluate"].add_argument(
        "--calibration", type=int, default=0, help="batches of 32 training texts to round weights for"
    )
    commands.choices["train"].add_argument(
        "--training", nargs="+", default=["qat", "after"], choices=TRAININGS
    )
    commands.choices["train"].add_argument(
        "--steps", type=int, help="by default as many as the data set gets"
    )
    commands.choices["train"].add_argument("--seeds", nargs="+", type=int, default=[0])
    commands.add_parser("table")
    commands.add_parser("figure").add_argument("--output", type=Path, default=FIGURE)
    return parser


if __name__ == "__main__":
    main()
