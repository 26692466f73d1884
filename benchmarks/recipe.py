"""What benchmarks that fine-tune encoders have in common: data sets, budgets of steps, files and rows.

Data are looked for in the folder named by LIGHTNING_COMPRESS_DATA.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForSequenceClassification

import lightning_compress
from lightning_compress.data import TextClassificationData
from lightning_compress.report.machine import describe_machine, describe_versions

__all__ = [
    "LEARNING_RATE",
    "TASKS",
    "StepClock",
    "Task",
    "append",
    "data_of",
    "header",
    "load_model",
    "rows_in",
    "save",
]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Task:
    """One data set and the budget of steps that every variant gets."""

    files: dict[str, str]
    text_column: list[str]
    max_length: int
    steps: int
    batch_size: int = 32
    pair: str | None = None


_SAMPLE = {"train": "train_sample.tsv", "test": "test_sample.tsv"}
_PARTS = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
TASKS = {
    "sst2": Task(_PARTS, ["text"], 64, 600),
    "ag_news": Task({"train": "train.tsv", "test": "test.tsv"}, ["title", "description"], 96, 400),
    "mrpc": Task(_PARTS, ["text"], 96, 300, pair="text2"),
    "imdb": Task(_SAMPLE, ["text"], 256, 120),
    "movies": Task(_PARTS, ["text"], 512, 120, batch_size=16),
}
FOLDERS = {"movies": "movies_rationales"}
LEARNING_RATE = 1e-4


class StepClock(Callback):
    """Time of each training step, of the first epoch and of later ones."""

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop it."""
        self.seconds[trainer.current_epoch == 0].append(time.perf_counter() - self._start)

    def median(self, *, first_epoch: bool) -> float | None:
        """Return the median of those steps in seconds; None if there were none."""
        steps = self.seconds[first_epoch]
        return round(statistics.median(steps), 4) if steps else None


def data_of(name: str, batch_size: int | None = None, bucket: bool = True) -> TextClassificationData:
    """Return the data module of a task."""
    task, root = TASKS[name], os.environ.get("LIGHTNING_COMPRESS_DATA")
    if root is None:
        raise SystemExit(f"set LIGHTNING_COMPRESS_DATA to the folder that holds {name}/ with {task.files}")
    folder = Path(root) / FOLDERS.get(name, name)
    files = {part: str(folder / file) for part, file in task.files.items()}
    return TextClassificationData(
        **files,  # type: ignore[arg-type]
        text_column=task.text_column,
        text_pair_column=task.pair,
        max_length=task.max_length,
        batch_size=batch_size or task.batch_size,
        bucket_by_length=bucket,
    )


def save(model: Any, data: TextClassificationData, folder: Path) -> None:
    """Keep a trained model with its tokenizer."""
    if lightning_compress.plan_of(model) is None:
        model.save_pretrained(folder)
    else:
        lightning_compress.save_pretrained(model, folder)
    data.tokenizer.save_pretrained(folder)


def load_model(folder: Path) -> Any:
    """Open a dense or a compressed model."""
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def header(name: str, variant: str, seed: int) -> dict[str, Any]:
    """Return what names a row and how it came about."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    task = TASKS[name]
    return {
        "task": name,
        "variant": variant,
        "seed": seed,
        "steps": task.steps,
        "batch_size": task.batch_size,
        "max_length": task.max_length,
        "commit": commit.stdout.strip(),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }


def rows_in(file: str) -> list[dict[str, Any]]:
    """Return the rows of a results file."""
    path = RESULTS / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(file: str, row: dict[str, Any]) -> None:
    """Add a row to a results file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / file).open("a") as stream:
        stream.write(json.dumps(row) + "\n")
