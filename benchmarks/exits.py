"""Time what asking an exit costs the packed engine, and what it gains when a share of the batch leaves there.

python benchmarks/exits.py --shapes 1x32 1x128 8x32 32x32 --shares 0.02 0.1 0.3 --rounds 9

An encoder of MiniLM's shape with random weights and exits; a rule that is told whom to let go. Variants take turns in
one process. Time is that of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress import Compressor, MultiExitConfig, set_exit_threshold
from lightning_compress.nn.exit_policy import ExitPolicy
from lightning_compress.nn.segments import Segments
from lightning_compress.report import describe_machine, describe_versions
from lightning_compress.runtime import packed_encoder
from lightning_compress.runtime.trial import kept_counts

LAYERS, VOCABULARY, WARM_UP = 6, 30_000, 3
MIDDLE = 2
"""The exit by which a share of the batch leaves; three layers are left."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the rounds, in milliseconds, and ratios paired by round."""

    batch_size: int
    length: int
    off_ms: float
    check_ms: float
    """Of asking one exit by which nobody leaves."""
    breaks_even: float
    """Share of the batch that has to leave for one check to pay, where one layer is left to be saved."""
    times: dict[str, float]
    """Time over that without exits, by the share that leaves after layer 2; "each" leaves 30 % at every exit."""
    token_layers: dict[str, float]
    """Tokens times layers over those without exits, likewise."""


def exiting(bits: torch.dtype) -> Any:
    """Return an encoder of MiniLM's shape with exits, which lets nobody go."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        vocab_size=VOCABULARY,
    )
    model: Any = BertForSequenceClassification(config)
    compressor = Compressor(model, [MultiExitConfig()])
    compressor.prepare()
    compressor.convert()
    return model.eval().to(bits)


class Timed:
    """Exits as they are, with the processor's time of each check."""

    def __init__(self, exits: ExitPolicy) -> None:
        self.exits, self.rule, self.layers = exits, exits.rule, exits.layers
        self.spent: list[float] = []

    def start(self, segments: Segments) -> None:
        """Begin a pass."""
        self.exits.start(segments)

    def look(self, layer: int, hidden_ND: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Ask an exit."""
        return self.exits.look(layer, hidden_ND, segments)

    def check(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        """Ask who stays."""
        start = time.thread_time()
        stay_B = self.exits.check(layer, hidden_ND, segments)
        if layer in self.layers:
            self.spent.append(1e3 * (time.thread_time() - start))
        return stay_B


def leaving(model: nn.Module, share: float, exits: list[int]) -> Callable[[], None]:
    """Return what lets a share of those still there go at each of some exits."""

    def configure() -> None:
        encoder = packed_encoder(model)
        assert encoder is not None and encoder.exits is not None
        set_exit_threshold(model, 0.5 if exits else None, exits=exits or None)
        rule: Any = encoder.exits.rule
        honest = type(rule).measure

        def measure(layer: int, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
            honest(rule, layer, logits_BC, hidden_BD)  # at its price
            stays = torch.arange(len(logits_BC)) >= round(share * len(logits_BC))
            return stays.to(logits_BC.dtype)

        rule.measure = measure

    return configure


def milliseconds(model: nn.Module, batch: Batch) -> float:
    """Return the processor's time of one pass."""
    start = time.thread_time()
    with torch.inference_mode():
        model(**batch)
    return 1e3 * (time.thread_time() - start)


def check_time(model: nn.Module, batch: Batch, rounds: int) -> float:
    """Return the median time of one check within passes that nobody leaves."""
    leaving(model, 0.0, list(range(LAYERS - 1)))()
    encoder = packed_encoder(model)
    assert encoder is not None and encoder.exits is not None
    exits, encoder.exits = encoder.exits, Timed(encoder.exits)
    del exits.rule.measure  # type: ignore[union-attr]  # the honest one
    set_exit_threshold(model, 1e-9)
    for _ in range(rounds):
        milliseconds(model, batch)
    spent, encoder.exits = encoder.exits.spent, exits
    return statistics.median(spent)


def measured(model: nn.Module, batch_size: int, length: int, shares: list[float], rounds: int) -> Row:
    """Time all variants of one shape, in turns."""
    variants = {"off": leaving(model, 0.0, [])}
    if batch_size > 1:
        variants |= {f"{share:g}": leaving(model, share, [MIDDLE]) for share in shares}
        variants["each"] = leaving(model, 0.3, list(range(LAYERS - 1)))
    batch = {"input_ids": torch.randint(5, VOCABULARY, (batch_size, length))}
    found: dict[str, list[float]] = {name: [] for name in variants}
    layers = {}
    for index in range(WARM_UP + rounds):
        for name, configure in variants.items():
            configure()
            elapsed = milliseconds(model, batch)
            layers[name] = float(kept_counts(packed_encoder(model)).sum()) / (LAYERS * batch_size * length)  # type: ignore[arg-type]
            if index >= WARM_UP:
                found[name].append(elapsed)
    off, check = statistics.median(found["off"]), check_time(model, batch, rounds)
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, found["off"], strict=True))
        for name, values in found.items()
        if name != "off"
    }
    shares_left = {name: layers[name] for name in ratios}
    return Row(batch_size, length, off, check, check / (off / LAYERS), ratios, shares_left)


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table("batch", "off ms", "check ms", "breaks even", "leaves", "time", "token-layers")
    for row in rows:
        cells = [f"{row.batch_size}x{row.length}", f"{row.off_ms:.2f}", f"{row.check_ms:.3f}"]
        table.add_row(*cells, f"{row.breaks_even:.1%}", "", "", "")
        for name, ratio in row.times.items():
            table.add_row("", "", "", "", name, f"{ratio:.3f}", f"{row.token_layers[name]:.3f}")
    Console().print(table)


def main() -> None:
    """Parse, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1x32", "1x128", "8x32", "32x32"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.02, 0.1, 0.3])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = exiting(getattr(torch, options.dtype))
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes]
    rows = [measured(model, size, length, options.shares, options.rounds) for size, length in shapes]
    show(rows)
    if options.json is not None:
        record = {
            "command": f"python benchmarks/exits.py --dtype {options.dtype} --rounds {options.rounds}",
            "rows": [asdict(row) for row in rows],
            "machine": describe_machine(),
            "versions": describe_versions(),
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
