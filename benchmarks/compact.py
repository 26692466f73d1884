"""Time `lightning_compress::compact` against indexing by hand, interleaved in one process.

    python benchmarks/compact.py --device cuda --dtype bf16

Refuses to time what does not agree with the reference, forward and gradient. On CPU the operator *is* its reference,
so the difference of these two columns is what a call through torch's dispatcher costs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_compress.ops.compact import compact, reference
from lightning_compress.report import describe_machine, describe_versions

__all__ = ["CANDIDATES", "Case", "check", "main", "measure"]

Compacted = tuple[Tensor, Tensor, Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLE_SECONDS = 0.002
"""How long one sample lasts at least; short calls are repeated."""


@dataclass(frozen=True)
class Case:
    """One packed batch: sequences of equal length, of which a random share of rows stays."""

    sequences: int
    length: int
    width: int
    kept_ratio: float

    def tensors(self, dtype: torch.dtype, device: str) -> Compacted:
        """Return rows, decisions and offsets."""
        generator = torch.Generator().manual_seed(0)
        num_rows = self.sequences * self.length
        hidden_ND = torch.randn(num_rows, self.width, generator=generator).to(device, dtype)
        keep_N = (torch.rand(num_rows, generator=generator) < self.kept_ratio).to(device)
        return hidden_ND, keep_N, torch.arange(0, num_rows + 1, self.length, device=device)


def by_index(hidden_ND: Tensor, keep_N: Tensor, cu_seqlens_B1: Tensor) -> Compacted:
    """Find the rows, select them, and read the new offsets from a running count."""
    index_M = keep_N.nonzero().squeeze(1)
    before_N1 = torch.cat([keep_N.new_zeros(1, dtype=torch.int64), keep_N.cumsum(0)])
    return hidden_ND.index_select(0, index_M), before_N1[cu_seqlens_B1], index_M


def by_mask(hidden_ND: Tensor, keep_N: Tensor, cu_seqlens_B1: Tensor) -> Compacted:
    """Index with the decisions themselves, once for the rows and once for their numbers."""
    before_N1 = torch.cat([keep_N.new_zeros(1, dtype=torch.int64), keep_N.cumsum(0)])
    numbers_N = torch.arange(keep_N.shape[0], device=keep_N.device)
    return hidden_ND[keep_N], before_N1[cu_seqlens_B1], numbers_N[keep_N]


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Compacted]] = {
    "compact": compact,
    "reference": reference.compact,
    "index": by_index,
    "mask": by_mask,
}


def check(candidate: Callable[[Tensor, Tensor, Tensor], Compacted], tensors: Compacted) -> None:
    """Compare a candidate with the reference, forward and gradient.

    Raises:
        RuntimeError: If anything differs by a bit.
    """
    hidden_ND, keep_N, cu_seqlens_B1 = tensors
    found, expected = [], []
    for function, results in ((candidate, found), (reference.compact, expected)):
        leaf_ND = hidden_ND.detach().clone().requires_grad_()
        results.extend(function(leaf_ND, keep_N, cu_seqlens_B1))
        results[0].square().sum().backward()
        results.append(leaf_ND.grad)
    for name, ours, theirs in zip(("rows", "offsets", "index", "gradient"), found, expected, strict=True):
        if not torch.equal(ours, theirs):
            raise RuntimeError(f"{name}: not what the reference gives, so nothing is timed")


def measure(case: Case, dtype: torch.dtype, device: str, rounds: int, clock: str) -> dict[str, list[float]]:
    """Return the microseconds a call took, by candidate and round; each round begins with another one."""
    tensors = case.tensors(dtype, device)
    for candidate in CANDIDATES.values():
        check(candidate, tensors)
    samples: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    with torch.inference_mode():
        repeats = {name: _repeats(candidate, tensors) for name, candidate in CANDIDATES.items()}
        for turn in range(rounds):
            names = list(itertools.islice(itertools.cycle(CANDIDATES), turn, turn + len(CANDIDATES)))
            for name in names:
                seconds = _seconds(CANDIDATES[name], tensors, repeats[name], clock)
                samples[name].append(seconds / repeats[name] * 1e6)
    return samples


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case of the command line and print one table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table(title="Microseconds per call, median; in brackets: median of the paired ratios to compact")
    table.add_column("rows × width, kept")
    for name in CANDIDATES:
        table.add_column(name, justify="right")
    for sequences, width, ratio in itertools.product(options.sequences, options.widths, options.kept):
        case = Case(sequences, options.length, width, ratio)
        samples = measure(case, DTYPES[options.dtype], options.device, options.rounds, options.clock)
        title = f"{sequences * options.length} × {width}, {ratio:.0%}"
        table.add_row(title, *(_cell(samples, name) for name in CANDIDATES))
    machine = describe_machine()
    where = machine.get("gpu") if options.device.startswith("cuda") else machine["cpu"]
    versions = ", ".join(f"{package} {version}" for package, version in describe_versions().items())
    how = f"{options.dtype}, {options.threads} thread(s), {options.clock} clock"
    table.caption = f"{where}, {how}, {versions}"
    Console().print(table)


def _cell(samples: dict[str, list[float]], name: str) -> str:
    ratio = statistics.median(a / b for a, b in zip(samples[name], samples["compact"], strict=True))
    return f"{statistics.median(samples[name]):.1f}" + ("" if name == "compact" else f" ({ratio:.2f})")


def _repeats(candidate: Callable[..., Compacted], tensors: Compacted) -> int:
    _seconds(candidate, tensors, 3, "wall")  # compiles, warms
    return max(1, round(SAMPLE_SECONDS / (_seconds(candidate, tensors, 3, "wall") / 3)))


def _seconds(candidate: Callable[..., Compacted], tensors: Compacted, repeats: int, clock: str) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    wait = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    wait()
    start = now()
    for _ in range(repeats):
        candidate(*tensors)
    wait()
    return now() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5], help="share of rows that stay")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a crowded machine")
    return parser


if __name__ == "__main__":
    main()
