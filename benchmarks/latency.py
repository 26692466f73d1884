"""Measures latency: a compressed model against its dense one, or low rank against dense at any width.

    python benchmarks/latency.py --random-encoder 768x3072x12 --ratios 0.5 0.25
    python benchmarks/latency.py --model COMPRESSED_DIR --against DENSE_DIR

Random weights will do for latency, so no model needs to be trained to learn at which width a saved FLOP
becomes time. How results are made, and what counts as noise, is in `benchmarks/README.md`.
"""

import argparse
import copy
import dataclasses
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.rank_budget import LayerSize
from lightning_compress.nn.soft_threshold_rank import LowRankLinear
from lightning_compress.nn.surgery import get_module, linear_shape, replace_module
from lightning_compress.report import LatencyTable, measure_latency
from lightning_compress.report.files import write_text_atomically

__all__ = ["encoder_shape", "low_rank_copy", "main", "random_encoder"]

_HEAD_DIM = 64
_RANK_MULTIPLE = 8
_DEFAULT_ENCODERS = ((384, 1536, 6), (768, 3072, 12))


def encoder_shape(text: str) -> tuple[int, int, int]:
    """Read `HIDDENxINTERMEDIATExLAYERS`, such as `768x3072x12`.

    Raises:
        argparse.ArgumentTypeError: If it does not read so, or is not of positive numbers.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HIDDENxINTERMEDIATExLAYERS, such as 768x3072x12")
    hidden, intermediate, layers = (int(part) for part in match.groups())
    return hidden, intermediate, layers


def random_encoder(hidden: int, intermediate: int, layers: int) -> BertForSequenceClassification:
    """Build a BERT classifier of that shape with random weights, and heads of 64 where the width allows."""
    torch.manual_seed(0)
    heads = hidden // _HEAD_DIM if hidden % _HEAD_DIM == 0 else 1
    config = BertConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return BertForSequenceClassification(config).eval()


def low_rank_copy(model: nn.Module, ratio: float) -> nn.Module:
    """Copy a model with each linear of its layers as two factors that hold `ratio` of its weights.

    Args:
        model: A dense model of a known family.
        ratio: Share of the weights of each linear, in (0, 1); ranks are rounded down to a multiple of 8.

    Raises:
        ValueError: If the ratio is not in (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio is {ratio}: give a share of the dense weights between 0 and 1")
    shrunk = copy.deepcopy(model)
    for slot in (slot for layer in describe(model).layers for slot in layer.linears):
        old = get_module(shrunk, slot.path)
        inputs, outputs = linear_shape(old)
        rank = max(1, int(ratio * LayerSize(inputs, outputs).break_even))
        rank = max(rank - rank % _RANK_MULTIPLE, min(rank, _RANK_MULTIPLE))
        has_bias = getattr(old, "bias", None) is not None
        new = LowRankLinear(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=has_bias))
        replace_module(shrunk, slot.path, new)
    return shrunk


def main(arguments: Sequence[str] | None = None) -> dict[str, LatencyTable]:
    """Measure what the command line asks for, print each table, and keep them all as JSON if asked.

    Returns:
        Title to table.
    """
    options = _parser().parse_args(arguments)
    if bool(options.model) != bool(options.against):
        _parser().error("--model and --against go together: give both, or --random-encoder")
    if options.quick:
        options.random_encoder, options.ratios = options.random_encoder or [_DEFAULT_ENCODERS[0]], [0.5]
        options.batch_sizes, options.rounds = [1, 8], 7
    tables: dict[str, LatencyTable] = {}
    for title, (models, baselines) in _comparisons(options).items():
        tables[title] = _measure(models, baselines, options)
        shown = tables[title].to_rich()
        shown.title = title
        Console().print(shown)
    if options.json is not None:
        kept = {title: table.to_dict() for title, table in tables.items()}
        write_text_atomically(options.json, json.dumps(kept, indent=1) + "\n")
    return tables


def _comparisons(options: argparse.Namespace) -> dict[str, tuple[Mapping[str, nn.Module | str], list[str]]]:
    """Title to models and baselines."""
    if options.model:
        folders = {Path(folder).name: folder for folder in (*options.against, options.model)}
        if len(folders) <= len(options.against):
            _parser().error("two of the folders share a name: rename one")
        rivals = [Path(folder).name for folder in options.against]
        return {f"{Path(options.model).name} against {', '.join(rivals)}": (folders, rivals)}
    found: dict[str, tuple[Mapping[str, nn.Module | str], list[str]]] = {}
    for shape in options.random_encoder or _DEFAULT_ENCODERS:
        dense = random_encoder(*shape)
        shrunk = {f"low rank {ratio:g}": low_rank_copy(dense, ratio) for ratio in options.ratios}
        title = "Random encoder, {} wide, {} in the feed-forward, {} layers".format(*shape)
        found[title] = ({"dense": dense, **shrunk}, ["dense"])
    return found


def _measure(
    models: Mapping[str, nn.Module | str], baselines: Sequence[str], options: argparse.Namespace
) -> LatencyTable:
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Timing", total=None)
        table = measure_latency(
            models,
            options.batch_sizes,
            options.lengths,
            options.dtypes,
            options.rounds,
            threads=options.threads,
            device=options.device,
            baselines=baselines,
            clock=options.clock,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    commit = _commit()
    return dataclasses.replace(table, versions=table.versions | ({"commit": commit} if commit else {}))


def _commit() -> str | None:
    """The commit of the working tree, marked where it was changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git here
        return None
    return found.stdout.strip() or None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    which = parser.add_argument_group("what to compare (default: two random encoders)")
    which.add_argument(
        "--random-encoder", type=encoder_shape, nargs="+", metavar="HxIxL", help="shapes to build"
    )
    which.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25], help="share of weights kept")
    which.add_argument("--model", metavar="DIR", help="a saved model, compressed or not")
    which.add_argument("--against", nargs="+", metavar="DIR", default=[], help="saved baselines")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    how.add_argument("--lengths", type=int, nargs="+", default=[128])
    how.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    how.add_argument("--rounds", type=int, default=21)
    how.add_argument("--threads", type=int, default=1)
    how.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a crowded machine")
    how.add_argument("--device", default="cpu")
    how.add_argument("--quick", action="store_true", help="one small encoder, few rounds: under a minute")
    how.add_argument("--json", metavar="FILE", help="keep all samples here")
    return parser


if __name__ == "__main__":
    main()
