"""What benchmarks that fine-tune encoders have in common: data sets, budgets of steps, the training, kept models.

Data are looked for in the folder named by LIGHTNING_COMPRESS_DATA.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from rows import provenance
from transformers import AutoModelForSequenceClassification

import lightning_compress
from lightning_compress.data import TextClassificationData
from lightning_compress.tasks import TextClassifier

__all__ = [
    "LEARNING_RATE",
    "TASKS",
    "Fit",
    "StepClock",
    "Task",
    "data_of",
    "fit",
    "header",
    "load_model",
    "save",
]


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
    """Time of each training step, and whether it belongs to the first epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.is_first_epoch: list[bool] = []
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)
        self.is_first_epoch.append(trainer.current_epoch == 0)

    def median(self, *, first_epoch: bool) -> float | None:
        """Return the median of the steps of the first epoch, or of later ones, in seconds; None if there were none."""
        pairs = zip(self.seconds, self.is_first_epoch, strict=True)
        steps = [seconds for seconds, is_first in pairs if is_first == first_epoch]
        return round(statistics.median(steps), 4) if steps else None


@dataclass(frozen=True)
class Fit:
    """A finished training."""

    trainer: Trainer
    module: TextClassifier
    data: TextClassificationData
    clock: StepClock
    seconds: float

    @property
    def model(self) -> Any:
        """The trained model."""
        assert self.module.model is not None
        return self.module.model

    def fields(self) -> dict[str, Any]:
        """Return the fields of a row that tell of the training."""
        return {
            "learning_rate": LEARNING_RATE,
            "fit_seconds": round(self.seconds, 1),
            "step_seconds": self.clock.median(first_epoch=True),
            "later_step_seconds": self.clock.median(first_epoch=False),
        }


def fit(name: str, callbacks: Sequence[Callback], start: str, steps: int | None = None) -> Fit:
    """Fine-tune from a model or a folder, on the processor in bf16 autocast; seed before the callbacks are made.

    Args:
        name: Data set.
        callbacks: What compresses.
        start: Model or folder to start from.
        steps: Optimizer steps; None for those of the data set.
    """
    clock = StepClock()
    trainer = Trainer(
        accelerator="cpu", precision="bf16-mixed", max_steps=steps or TASKS[name].steps, gradient_clip_val=1.0,
        callbacks=[clock, *callbacks], logger=False, enable_checkpointing=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0, enable_progress_bar=False,
    )  # fmt: skip
    module, data = TextClassifier(start, learning_rate=LEARNING_RATE), data_of(name)
    begun = time.perf_counter()
    trainer.fit(module, datamodule=data)
    return Fit(trainer, module, data, clock, seconds=time.perf_counter() - begun)


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


def header(name: str, variant: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Return what names a row and how it came about; ``steps`` is None for those of the data set."""
    task = TASKS[name]
    return {
        "task": name,
        "variant": variant,
        "seed": seed,
        "steps": steps or task.steps,
        "batch_size": task.batch_size,
        "max_length": task.max_length,
        **provenance(),
    }
