"""Hold static token dropping (fixed counts per layer) against dynamic (thresholds), in PyTorch and in onnxruntime.

    python benchmarks/static.py --task imdb --variant flops33
    python benchmarks/static.py --task sst2 --model DIR --dense DENSE_DIR --quantiles 0.95 0.8 --limit 512

The models are those that ``benchmarks/token_dropping.py train`` kept, or the folders named; the data are found as it
finds them. Counts are quantiles of what thresholds keep on training texts. Every rival answers all test texts (or
``--limit`` of them) for its accuracy; then all take turns over the same batches, texts as they come, and ratios are
formed within a round. Fixed shapes mean that static models in onnxruntime get every text padded to the longest
allowed; in PyTorch, and without dropping, batches are padded to their own longest text. int8 is dynamic quantisation.
Time is that of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from latency_rounds import Batch, Runner, batches_of, in_turns, median_ratio
from recipe import TASKS, header, load_model
from rich.console import Console
from rich.table import Table
from rows import append
from token_dropping import folder_of
from torch import Tensor, nn

from lightning_compress.deploy.export import export_onnx
from lightning_compress.runtime.static import make_static, static_counts

__all__ = ["main"]

RESULTS = "static.jsonl"
BASELINE = "dense torch"
COUNTED_BATCHES = 16

Answer = Callable[[Batch], Tensor]
"""Logits of a batch."""


def in_torch(model: nn.Module) -> Answer:
    """Return a model as a function."""

    def answer(batch: Batch) -> Tensor:
        with torch.inference_mode():
            return model(**batch).logits

    return answer


def in_onnxruntime(model: nn.Module, length: int | None, counts: Sequence[int] | None, int8: bool) -> Answer:
    """Export a model and return it as a function; with a length, batches are padded to it."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(
            model, Path(folder) / "model.onnx", length=length or "dynamic", counts=counts, int8=int8
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def answer(batch: Batch) -> Tensor:
        missing = 0 if length is None else length - batch["input_ids"].shape[1]
        feed = {name: F.pad(batch[name], (0, missing)).numpy() for name in names}
        return torch.from_numpy(session.run(None, feed)[0])

    return answer


def build_rivals(
    dropping: nn.Module, dense: nn.Module, counts: dict[float, tuple[int, ...]], length: int
) -> Iterator[tuple[str, Answer]]:
    """Yield each rival by its name, the baseline first."""
    yield BASELINE, in_torch(dense)
    yield "dynamic torch", in_torch(dropping)
    for quantile, kept in counts.items():
        yield f"static {quantile:g} torch", in_torch(make_static(dropping, kept))
    for suffix, int8 in (("fp32", False), ("int8", True)):
        yield f"dense onnxruntime {suffix}", in_onnxruntime(dense, None, None, int8)
        for quantile, kept in counts.items():
            yield (
                f"static {quantile:g} onnxruntime {suffix}",
                in_onnxruntime(dropping, length, kept, int8),
            )


def accuracy(answer: Answer, batches: list[Batch], labels: list[Tensor]) -> float:
    """Return the share of right answers."""
    right = sum(int((answer(b).argmax(-1) == y).sum()) for b, y in zip(batches, labels, strict=True))
    return right / sum(len(y) for y in labels)


def time_in_turns(rivals: dict[str, Answer], batches: list[Batch], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each rival over all batches, round by round; each round begins with another one."""
    return in_turns({name: _over_all(answer) for name, answer in rivals.items()}, batches, rounds)


def _over_all(answer: Answer) -> Runner:
    def run(batches: list[Batch]) -> None:
        for batch in batches:
            answer(batch)

    return run


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table per batch size, and append the rows to the results.

    Returns:
        The rows.
    """
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    dropping = load_model(args.model or folder_of(args.task, args.variant, 0))
    dense = load_model(args.dense or folder_of(args.task, "dense", 0))
    training, _ = batches_of(args.task, 32, 32 * COUNTED_BATCHES, "train")
    counts = {quantile: static_counts(dropping, training, quantile) for quantile in args.quantiles}
    rivals = dict(build_rivals(dropping, dense, counts, TASKS[args.task].max_length))
    texts, labels = batches_of(args.task, 32, args.limit)
    right = {name: accuracy(answer, texts, labels) for name, answer in rivals.items()}
    rows = []
    for batch_size in args.batch_sizes:
        batches, _ = batches_of(args.task, batch_size, args.texts)
        samples = time_in_turns(rivals, batches, args.rounds)
        for name, seconds in samples.items():
            kept = [kept for quantile, kept in counts.items() if name.startswith(f"static {quantile:g} ")]
            rows.append(
                {
                    **header(args.task, args.variant, 0),
                    "onnxruntime": version("onnxruntime"),
                    "rival": name,
                    "counts": kept[0] if kept else None,
                    "accuracy": right[name],
                    "texts": sum(len(y) for y in labels),
                    "batch_size": batch_size,
                    "timed_texts": sum(len(batch["input_ids"]) for batch in batches),
                    "rounds": args.rounds,
                    "median_seconds": statistics.median(seconds),
                    "ratio": round(median_ratio(samples[BASELINE], seconds), 3),
                    "seconds": [round(s, 5) for s in seconds],
                }
            )
        _print(args.task, batch_size, rows[-len(samples) :])
    for row in rows if args.keep else ():
        append(RESULTS, row)
    return rows


def _print(task: str, batch_size: int, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{task}, batch {batch_size}")
    table.add_column("rival", no_wrap=True)
    for column in ("accuracy", "ms a text", "x dense"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("counts")
    for row in rows:
        milliseconds = 1e3 * row["median_seconds"] / row["timed_texts"]
        counts = " ".join(map(str, row["counts"] or ()))
        table.add_row(
            row["rival"], f"{100 * row['accuracy']:.2f}", f"{milliseconds:.2f}", f"{row['ratio']:.2f}", counts
        )
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--variant", default="flops50", help="of benchmarks/token_dropping.py; names the row")
    parser.add_argument("--model", type=Path, help="folder of a token-dropping model instead")
    parser.add_argument("--dense", type=Path, help="folder of the dense model instead")
    parser.add_argument("--quantiles", type=float, nargs="+", default=[0.95, 0.8])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--texts", type=int, default=32, help="how many are timed")
    parser.add_argument("--limit", type=int, help="how many are answered for the accuracy; all by default")
    parser.add_argument(
        "--no-keep", dest="keep", action="store_false", help=f"print only, add nothing to {RESULTS}"
    )
    return parser


if __name__ == "__main__":
    main()
