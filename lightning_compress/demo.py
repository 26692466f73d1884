"""The main job end to end: fine-tune the embedded encoder dense and with one callback, and show what was gained."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from lightning_compress.callbacks import CompressionReport, SoftThresholdRank
from lightning_compress.data import TextClassificationData
from lightning_compress.deploy import disk_bytes, save_pretrained
from lightning_compress.nn.flops import ParameterCount, count_flops, count_parameters
from lightning_compress.report import measure_latency
from lightning_compress.tasks import TextClassifier

__all__ = ["Outcome", "run_demo"]

_BATCH_SIZES, _LENGTH = (1, 8, 32), 64
_OPENS_WITHOUT_LIGHTNING = """
import sys, lightning_compress
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
tokens = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2], return_tensors="pt")
label = model.config.id2label[int(model(**tokens).logits.argmax())]
assert "lightning" not in sys.modules
print(label)
"""


@dataclass(frozen=True)
class Outcome:
    """What one of the two runs came to."""

    validation: dict[str, float]
    accuracy: float
    parameters: ParameterCount
    flops: float
    weight_bytes: int
    folder: Path


def run_demo(
    steps: int = 300, target_params: float = 0.5, output: Path = Path("demo-output"), seed: int = 0
) -> None:
    """Run the demo and print its tables.

    Args:
        steps: Optimizer steps of each of the two runs, at least 1.
        target_params: Share of the linear weights to keep, in (0, 1].
        output: Folder for the two models and the report.
        seed: Seed of both runs.

    Raises:
        ValueError: If a number is out of its range.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} is below 1")
    method = SoftThresholdRank(target_params=target_params)
    _quieten()
    console = Console()
    console.print(f"[bold]1/3[/] Fine-tune all-MiniLM-L6-v2 (dense) on stdlib-docs, {steps} steps")
    dense = _train("dense", [], steps, output, seed)
    console.print(
        f"[bold]2/3[/] The same with SoftThresholdRank(target_params={target_params}), {steps} steps"
    )
    report = CompressionReport(str(output / "report"), lengths=[_LENGTH], dense_metrics=dense.validation)
    compressed = _train("compressed", [method, report], steps, output, seed)
    console.print("[bold]3/3[/] Measure latency, interleaved")
    folders = {"dense": dense.folder, "compressed": compressed.folder}
    latency = measure_latency(folders, _BATCH_SIZES, [_LENGTH], rounds=11)
    console.print(_gains(dense, compressed), latency.to_rich())
    _show_use(console, compressed.folder)
    console.print(f"Report: {report.path}")


def _train(name: str, callbacks: list[Callback], steps: int, output: Path, seed: int) -> Outcome:
    seed_everything(seed, verbose=False)
    data = TextClassificationData(max_length=_LENGTH, seed=seed)
    module = TextClassifier(
        num_labels=data.num_labels, label_names=list(data.label_names or ()), learning_rate=1e-4
    )
    data.prepare_data()
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=steps,
        max_epochs=math.ceil(steps * data.batch_size / len(data.lengths("train"))),
        gradient_clip_val=1.0,
        callbacks=[*callbacks, RichProgressBar(leave=True)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        default_root_dir=output,
    )
    trainer.fit(module, datamodule=data)
    validation = {name: float(trainer.callback_metrics[name]) for name in ("val/acc", "val/loss")}
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    assert module.model is not None
    folder = output / name
    if callbacks:
        save_pretrained(module.model, folder, tokenizer=data.tokenizer)
    else:
        module.model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
    lengths = data.lengths("test")
    flops = count_flops(module.model, lengths).total / len(lengths)
    return Outcome(
        validation, metrics["test/acc"], count_parameters(module.model), flops, disk_bytes(folder), folder
    )


def _gains(dense: Outcome, compressed: Outcome) -> Table:
    table = Table(title="What one callback changed", title_justify="left")
    table.add_column("")
    for heading in ("dense", "compressed", "ratio"):
        table.add_column(heading, justify="right")
    rows = {
        "linear parameters (M)": (dense.parameters.linear / 1e6, compressed.parameters.linear / 1e6),
        "encoder parameters (M)": (dense.parameters.encoder / 1e6, compressed.parameters.encoder / 1e6),
        "total parameters (M)": (dense.parameters.total / 1e6, compressed.parameters.total / 1e6),
        "weights on disk (MB)": (dense.weight_bytes / 1e6, compressed.weight_bytes / 1e6),
        "FLOPs per text (M)": (dense.flops / 1e6, compressed.flops / 1e6),
        "test accuracy (%)": (100 * dense.accuracy, 100 * compressed.accuracy),
    }
    for name, (before, after) in rows.items():
        table.add_row(name, f"{before:.2f}", f"{after:.2f}", f"{after / before:.3f}")
    return table


def _show_use(console: Console, folder: Path) -> None:
    text = "Accept a connection on a listening socket and return the new socket and the address of the peer."
    command = [sys.executable, "-c", _OPENS_WITHOUT_LIGHTNING, str(folder), text]
    label = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
    )
    console.print(
        f"Opened by AutoModelForSequenceClassification in a process without Lightning: {text!r} → {label}"
    )


def _quieten() -> None:
    """Keep host libraries' advice and progress bars of their own out of the demo's output."""
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
