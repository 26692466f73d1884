"""Time quantised encoders against what users have instead, all in turns in one process.

    python benchmarks/quantized_latency.py
    python benchmarks/quantized_latency.py --shapes 1x32 8x128 --rivals "dense" "w8a8" "onnxruntime"
    python benchmarks/quantized_latency.py --model DENSE_DIR --compressed slim=DIR ranks=DIR --shapes 8x128
    python benchmarks/quantized_latency.py table

The model has MiniLM's shape and random weights unless a folder is named. Texts are random, as long as the shape says,
without padding. Ours are ``w8a8`` and ``w4a8``: quantised without training, with the backend that ``use_backend`` finds
for the shape; packed, as the family's own code runs them, or exported; ``exact`` ones are computed by the reference.
Runtimes that are not installed are named and left out. Time is that of the processor, on one thread; ratios are formed
within a round. Shapes that the results file holds for a model are skipped. Of compressed models ``x dense`` is against
the dense one in the same runtime and numbers, to be held against ``FLOPs``, what a pass needs less. ``--rivals`` takes
those whose names begin so, the two dense ones always; ``--no-compile`` leaves out what takes a minute for each shape.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import runtimes
import torch
from latency_rounds import BASELINES, CLOCKS, Batch, in_turns, median_ratio
from recipe import load_model
from rich.console import Console
from rich.table import Table
from rows import append, provenance, rows_in
from runtimes import Answer, in_onnxruntime, in_openvino, in_torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import lightning_compress
from lightning_compress.nn.kept_flops import DroppingCosts

__all__ = ["main"]

RESULTS = "quantized_latency.jsonl"
SHAPES = [f"{batch}x{length}" for batch in (1, 8, 32) for length in (32, 128, 256)]
EAGER = ("dense fp32", "dense bf16", "torch.ao int8 onednn", "torch.ao int8 fbgemm", "torchao int8")
"""What is eager in PyTorch and not ours."""

Row = dict[str, Any]
Build = Callable[[tuple[int, int], list[Batch]], Answer]
"""Makes a rival ready for a shape; the batches are those that will be timed."""


def minilm_shape() -> nn.Module:
    """Return an encoder of MiniLM's shape with random weights."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    return BertForSequenceClassification(config).eval()


def texts(shape: tuple[int, int], vocabulary: int) -> list[Batch]:
    """Return batches of random texts: several where they are small."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(max(1, 8 // shape[0])):
        ids_BT = torch.randint(1000 % vocabulary, vocabulary, shape, generator=generator)
        ones_BT = torch.ones_like(ids_BT)
        batches.append(
            {"input_ids": ids_BT, "attention_mask": ones_BT, "token_type_ids": torch.zeros_like(ids_BT)}
        )
    return batches


def rivals_of(
    dense: nn.Module, compressed: dict[str, nn.Module], folder: Path
) -> Iterator[tuple[str, Build]]:
    """Yield all rivals that can run here, by name.

    Args:
        dense: In fp32.
        compressed: Models that this library made of it, by name.
        folder: Where exported files go.
    """
    missing = runtimes.absent()
    bf16 = copy.deepcopy(dense).to(torch.bfloat16)
    yield "dense fp32", lambda *_: in_torch(dense)
    yield "dense bf16", lambda *_: in_torch(bf16)
    yield "packed fp32", lambda *_: in_torch(_packed(dense))
    yield "packed bf16", lambda *_: in_torch(_packed(bf16))
    for name in ("w8a8", "w4a8"):
        yield name, lambda shape, _, name=name: in_torch(_quantized(dense, name, shape))
        yield f"{name} bf16", lambda shape, _, name=name: in_torch(_quantized(bf16, name, shape))
        yield f"{name} packed", lambda shape, _, name=name: in_torch(_quantized(_packed(dense), name, shape))
    yield (
        "w8a8 packed, all int8",
        lambda shape, _: in_torch(_quantized(_packed(dense), "w8a8", shape, backend="int8")),
    )
    for name, block in (("w8a8", "row"), ("w4a8", (1, 128))):
        yield (
            f"exact {name} {block}",
            lambda *_, name=name, block=block: in_torch(_exact(dense, name, block)),
        )
    for engine in ("onednn", "fbgemm"):
        yield f"torch.ao int8 {engine}", lambda *_, engine=engine: runtimes.in_torch_int8(dense, engine)
    if "torchao" not in missing:
        yield "torchao int8", lambda *_: runtimes.in_torchao(dense)
    yield "compiled bf16, frozen", lambda *_: runtimes.compiled(bf16)
    if "onnxruntime" not in missing:
        path = folder / "dynamic.onnx"
        yield (
            "onnxruntime quantize_dynamic",
            lambda *_: in_onnxruntime(_once(path, runtimes.dynamic_onnx, dense)),
        )
    yield from _exported("dense", dense, folder, missing)
    for name, model in compressed.items():
        yield f"{name} packed fp32", lambda *_, model=model: in_torch(_packed(model))
        yield (
            f"{name} packed bf16",
            lambda *_, model=model: in_torch(_packed(copy.deepcopy(model).to(torch.bfloat16))),
        )
        yield (
            f"{name} w8a8 packed",
            lambda shape, _, model=model: in_torch(_quantized(_packed(model), "w8a8", shape)),
        )
        yield from _exported(name, model, folder, missing)


def _exported(
    name: str, model: nn.Module, folder: Path, missing: Sequence[str]
) -> Iterator[tuple[str, Build]]:
    """Yield a model in onnxruntime and OpenVINO, exported by this library."""
    full, small, held = (folder / f"{name}-{kind}.onnx" for kind in ("fp32", "int8", "weights"))
    make, for_openvino = runtimes.ours_onnx, {"int8": True, "runtime": "openvino"}
    if "onnxruntime" not in missing:
        yield f"{name} onnxruntime fp32", lambda *_: in_onnxruntime(_once(full, make, model))
        yield f"{name} onnxruntime int8", lambda *_: in_onnxruntime(_once(small, make, model, int8=True))
    if {"onnxruntime", "openvino"} & set(missing):  # the former checks what is exported
        return
    for suffix, hint in (("fp32", "f32"), ("bf16", "bf16")):
        yield (
            f"{name} openvino {suffix}",
            lambda shape, _, hint=hint: in_openvino(_once(full, make, model), shape, hint),
        )
    for suffix, hint, group in (("int8 weights, bf16", "bf16", 0), ("int8 by 128", "f32", 128)):
        yield (
            f"{name} openvino {suffix}",
            lambda shape, _, hint=hint, group=group: in_openvino(
                _once(held, make, model, **for_openvino), shape, hint, group
            ),
        )
    if "nncf" not in missing:
        yield (
            f"{name} openvino int8 calibrated, bf16",
            lambda shape, batches: in_openvino(_once(full, make, model), shape, "bf16", calibration=batches),
        )


def _once(path: Path, make: Callable[..., Path], model: nn.Module, **form: Any) -> Path:
    return path if path.exists() else make(model, path, **form)


def _packed(model: nn.Module) -> nn.Module:
    return lightning_compress.pack(copy.deepcopy(model)).eval()


def _exact(model: nn.Module, preset: Any, block: Any) -> nn.Module:
    return lightning_compress.quantize(copy.deepcopy(model), preset, block=block)


def _quantized(model: nn.Module, preset: Any, shape: tuple[int, int], backend: str = "auto") -> nn.Module:
    small = lightning_compress.quantize(copy.deepcopy(model), preset)
    report = lightning_compress.use_backend(
        small, backend, batch_tokens=(shape[0] * shape[1],), verbose=False
    )
    print(str(report).partition("\n")[0], file=sys.stderr)
    return small


def measure(
    models: tuple[nn.Module, dict[str, nn.Module]],
    shape: tuple[int, int],
    args: argparse.Namespace,
    folder: Path,
) -> list[Row]:
    """Time all rivals at one shape, and return a row for each."""
    dense, compressed = models
    batches = texts(shape, dense.config.vocab_size)  # type: ignore[union-attr,arg-type]
    answers = {
        name: build(shape, batches)
        for name, build in rivals_of(dense, compressed, folder)
        if name in BASELINES or _is_wanted(name, args)
    }
    errors = {
        name: _logit_error(answer, answers[BASELINES[0]], batches[0]) for name, answer in answers.items()
    }
    runners = {name: runtimes.over_all(answer) for name, answer in answers.items()}
    samples = in_turns(runners, batches, args.rounds, args.clock)
    eager = {name: statistics.median(samples[name]) for name in EAGER if name in samples}
    flops = {name: _flops_ratio(dense, model, shape) for name, model in compressed.items()}
    common = {
        "model": str(args.model or "random MiniLM"),
        "batch_size": shape[0],
        "length": shape[1],
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "rounds": args.rounds,
        "absent": runtimes.absent(),
        **provenance(),
        "runtimes": runtimes.versions(),
    }
    return [
        {
            **common,
            "rival": name,
            "median_seconds": statistics.median(seconds) / len(batches),
            "x_fp32": round(median_ratio(samples["dense fp32"], seconds), 3),
            "x_bf16": round(median_ratio(samples["dense bf16"], seconds), 3),
            "x_best_eager": round(median_ratio(samples[min(eager, key=eager.__getitem__)], seconds), 3),
            "x_same": _against_dense(name, list(compressed), samples),
            "logit_error": errors[name],
            "flops_speedup": next((r for key, r in flops.items() if name.startswith(f"{key} ")), None),
            "seconds": [round(s, 5) for s in seconds],
        }
        for name, seconds in samples.items()
    ]


def _against_dense(name: str, compressed: list[str], samples: dict[str, list[float]]) -> float | None:
    """Return how many times faster a compressed model is than the dense one in the same runtime and numbers."""
    rest = next((name.removeprefix(f"{key} ") for key in compressed if name.startswith(f"{key} ")), None)
    partner = next((other for other in (f"dense {rest}", rest) if other in samples), None)
    return None if partner is None else round(median_ratio(samples[partner], samples[name]), 3)


def _is_wanted(name: str, args: argparse.Namespace) -> bool:
    if name.startswith("compiled") and not args.compile:
        return False
    return not args.rivals or any(name.startswith(start) for start in args.rivals)


def _logit_error(answer: Answer, truth: Answer, batch: Batch) -> float:
    """Return how far logits are from the dense model's, over the size of those.

    Raises:
        ValueError: If they are not finite: such a rival is not timed.
    """
    found_BC, wanted_BC = answer(batch).float(), truth(batch).float()
    if not bool(found_BC.isfinite().all()):
        raise ValueError("a rival answers with numbers that are not finite: leave it out by --rivals")
    return round(float((found_BC - wanted_BC).norm() / wanted_BC.norm()), 5)


def _flops_ratio(dense: nn.Module, model: nn.Module, shape: tuple[int, int]) -> float:
    """Return dense over compressed FLOPs of texts that run all layers with all tokens."""
    lengths_B = torch.full((shape[0],), shape[1])
    before, after = (
        DroppingCosts.of(_packed(part), last_layer="first", policy_flops_per_token=0, exit_flops=0)
        for part in (dense, model)
    )
    all_BL = lengths_B[:, None].expand(-1, len(before.kept))
    return round(float(before.flops(all_BL, lengths_B).sum() / after.flops(all_BL, lengths_B).sum()), 3)


def print_rows(rows: Sequence[Row]) -> None:
    """Print the rivals of one shape, the fastest first."""
    shape = f"{rows[0]['batch_size']} x {rows[0]['length']}"
    columns = ("ms", "x fp32", "x bf16", "x best eager", "logits off", "x dense", "FLOPs")
    table = Table("rival", *columns, title=shape)
    for row in sorted(rows, key=lambda r: r["median_seconds"]):
        table.add_row(
            row["rival"], f"{1e3 * row['median_seconds']:.1f}", f"{row['x_fp32']:.2f}", f"{row['x_bf16']:.2f}",
            f"{row['x_best_eager']:.2f}", f"{row['logit_error']:.3f}", str(row["x_same"] or ""),
            str(row["flops_speedup"] or ""),
        )  # fmt: skip
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print it, or print what is there."""
    args = _parser().parse_args(arguments)
    key = str(args.model or "random MiniLM")
    torch.set_num_threads(args.threads)
    shapes = [(int(batch), int(length)) for batch, _, length in (word.partition("x") for word in args.shapes)]
    missing = runtimes.absent()
    print(f"not installed, and left out: {', '.join(missing) or 'nothing'}")
    dense = load_model(args.model) if args.model else minilm_shape()
    named = dict(word.split("=", 1) for word in args.compressed)
    models = (dense, {name: load_model(Path(folder)) for name, folder in named.items()})
    for shape in shapes if args.command == "run" else ():
        if args.keep and any(_place(row) == (key, *shape) for row in rows_in(RESULTS)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(models, shape, args, Path(folder))
        for row in rows if args.keep else ():
            append(RESULTS, row)
        print_rows(rows)
    for shape in shapes if args.command == "table" else ():
        rows = [row for row in rows_in(RESULTS) if _place(row) == (key, *shape)]
        if rows:
            print_rows(rows)


def _place(row: Row) -> tuple[str, int, int]:
    return row["model"], row["batch_size"], row["length"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["run", "table"], default="run")
    parser.add_argument("--model", type=Path, help="folder of a dense classifier; random weights by default")
    parser.add_argument("--compressed", nargs="+", default=[], metavar="NAME=DIR", help="what was made of it")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BATCHxTOKENS")
    parser.add_argument("--rivals", nargs="+", default=[], help="beginnings of names; all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="print only")
    return parser


if __name__ == "__main__":
    main()
