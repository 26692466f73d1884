"""Measures latency so that a ratio can be believed: all models in turns, in one process, on the same batch.

A machine speeds up and slows down by tens of percent within seconds. So each round times every model in every
dtype once, beginning with another each time, and only ratios *within* a round are formed (`latency_table`).
"""

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.report.files import write_text_atomically
from lightning_compress.report.latency_inputs import (
    CLOCKS,
    DTYPES,
    check_clock,
    check_lengths,
    check_lists,
    check_numbers,
    load_any,
    name_folders,
    random_batch,
)
from lightning_compress.report.latency_table import LatencyTable, Timing
from lightning_compress.runtime.backends import check_backend, use_backend

__all__ = ["measure_latency", "run_bench"]

Variants = dict[tuple[str, str], nn.Module]


def measure_latency(
    models: Mapping[str, nn.Module | str | Path],
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    dtypes: Sequence[str] = ("fp32", "bf16"),
    rounds: int = 21,
    warmup: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    *,
    baselines: Sequence[str] | None = None,
    clock: str = "wall",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    backend: str | None = None,
) -> LatencyTable:
    """Time whole forward passes of several models against each other, interleaved.

    Every batch is full: random token ids, an attention mask of ones. For a decoder the pass is the prefill of
    a prompt of that length, with the language-model head on every token. Copies are cast and timed: the
    models given stay as they are.

    Args:
        models: Name to transformers model, or to a folder that `load_any` opens.
        batch_sizes: Sequences per batch.
        lengths: Tokens per sequence.
        dtypes: Names out of `DTYPES`; parameters and buffers are cast, no autocast.
        rounds: Timed passes of each model and dtype for each shape.
        warmup: Untimed passes before, at least 1.
        threads: Threads inside an operator; None leaves torch's setting. The setting is restored.
        device: Where to run, such as `"cpu"` or `"cuda"`.
        baselines: Models to hold the others against; None means the first one.
        clock: `"wall"`, or `"cpu"`: processor time, for a crowded machine; one thread on the CPU only.
        seed: Seed of the token ids; the global generator is not touched.
        progress: Called with (rounds done, rounds in all) after each round.
        backend: What computes the linears of all models that have quantised ones, as `use_backend` takes it;
            it is printed, and the table tells it. None leaves them to the reference.

    Returns:
        The table of paired samples.

    Raises:
        TypeError: If a model has no `config` with a vocabulary.
        ValueError: If a list is empty, a number is not positive, a dtype, clock, baseline or backend is unknown,
            a length exceeds a model's positions, a folder holds no model, a backend is asked for and no linear is
            quantised, or outputs are not finite.
    """
    check_lists(models, batch_sizes, lengths, dtypes)
    check_numbers(
        batch_sizes, lengths, rounds=rounds, warmup=warmup, threads=1 if threads is None else threads
    )
    check_clock(clock, torch.get_num_threads() if threads is None else threads, device)
    if backend is not None:
        check_backend(backend)
    held_against = tuple(baselines) if baselines is not None else tuple(models)[:1]
    unknown = [name for name in held_against if name not in models]
    if unknown:
        raise ValueError(
            f"baselines {unknown} are not among the models {list(models)}: name models that are timed"
        )
    loaded = {name: load_any(m) if isinstance(m, str | Path) else m for name, m in models.items()}
    for name, model in loaded.items():
        check_lengths(name, model, lengths)
    fast = [name for name, model in loaded.items() if _is_quantized(model)]
    if backend is not None and not fast:
        raise ValueError(
            f"backend={backend!r}: none of the models {list(models)} has a quantised linear; leave it out"
        )
    variants = _cast_copies(loaded, dtypes, device)
    timings: list[Timing] = []
    shapes = list(product(batch_sizes, lengths))
    with _threads(threads), torch.inference_mode():
        backends: dict[str, str] = {}
        if backend is not None:
            quantised = {key: model for key, model in variants.items() if key[0] in fast}
            backends = _speed_up(quantised, backend, shapes)
        for index, (batch_size, length) in enumerate(shapes):
            batch = random_batch(loaded, batch_size, length, seed, device)
            _warm_up(variants, batch, warmup)
            turns: list[dict[tuple[str, str], float]] = []
            for turn in _rounds(variants, batch, rounds, CLOCKS[clock], device):
                turns.append(turn)
                if progress is not None:
                    progress(index * rounds + len(turns), len(shapes) * rounds)
            timings += [Timing(*key, batch_size, length, tuple(t[key] for t in turns)) for key in variants]
        used = torch.get_num_threads()
    return LatencyTable.taken_here(
        timings,
        held_against,
        threads=used,
        warmup=warmup,
        clock=clock,
        device=str(torch.device(device)),
        backends=backends,
    )


def run_bench(
    model: str | Path,
    against: str | Path | Sequence[str | Path],
    batch_sizes: Sequence[int] = (1, 8, 32),
    lengths: Sequence[int] = (128,),
    dtypes: Sequence[str] = ("fp32", "bf16"),
    rounds: int = 21,
    threads: int | None = None,
    json_path: str | Path | None = None,
    *,
    warmup: int = 3,
    clock: str = "wall",
    backend: str | None = None,
) -> LatencyTable:
    """Do what `lightning-compress bench` does: open folders, measure, print, and keep the table.

    Args:
        model: Folder of the model in question.
        against: Folder, or folders, of the baselines.
        batch_sizes: Sequences per batch.
        lengths: Tokens per sequence.
        dtypes: Names out of `DTYPES`.
        rounds: Timed passes of each.
        threads: Threads inside an operator; None leaves torch's setting.
        json_path: Where to write the table as JSON; None writes nothing.
        warmup: Untimed passes of each before.
        clock: See `measure_latency`.
        backend: See `measure_latency`.

    Returns:
        The table that was printed.

    Raises:
        ValueError: As `measure_latency`; also if `against` is empty or names a folder twice.
    """
    rivals = [against] if isinstance(against, str | Path) else list(against)
    if not rivals:
        raise ValueError("against=[]: name at least one model folder to hold the measured one against")
    folders = name_folders([Path(model), *(Path(rival) for rival in rivals)])
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Timing", total=None)
        table = measure_latency(
            folders,
            batch_sizes,
            lengths,
            dtypes,
            rounds,
            warmup,
            threads,
            baselines=list(folders)[1:],
            clock=clock,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            backend=backend,
        )
    if json_path is not None:
        write_text_atomically(json_path, table.to_json())
    Console().print(table.to_rich())
    return table


def _cast_copies(models: Mapping[str, nn.Module], dtypes: Sequence[str], device: str) -> Variants:
    """One eval copy of each model for each dtype, so that what the caller gave stays untouched."""
    return {
        (name, dtype): copy.deepcopy(model).to(device=torch.device(device), dtype=DTYPES[dtype]).eval()
        for name, model in models.items()
        for dtype in dtypes
    }


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def _speed_up(variants: Variants, backend: str, shapes: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Let quantised linears be computed by a backend, chosen at the numbers of tokens that will be timed, and tell."""
    tokens = sorted({batch_size * length for batch_size, length in shapes})
    chosen = {}
    for (name, dtype), model in variants.items():
        report = use_backend(model, backend, batch_tokens=tokens, verbose=False)
        print(f"{name} in {dtype}, {report}")
        chosen[f"{name} {dtype}"] = report.summary
    return chosen


def _warm_up(variants: Variants, batch: dict[str, Tensor], warmup: int) -> None:
    """Run every variant untimed, and refuse to time one whose outputs are not numbers."""
    for (name, dtype), model in variants.items():
        for _ in range(warmup):
            output = model(**batch)
        first = output[0]
        if not bool(torch.isfinite(first).all()):
            raise ValueError(
                f"{name!r} in {dtype} gives outputs that are not finite: its time would mean nothing. "
                "Leave out that dtype, or check the weights"
            )


def _rounds(
    variants: Variants, batch: dict[str, Tensor], rounds: int, clock: Callable[[], int], device: str
) -> Iterator[dict[tuple[str, str], float]]:
    """Yield, round by round, the milliseconds of each variant; each round begins one variant further."""
    order = list(variants)
    with _no_garbage_collection():
        for index in range(rounds):
            start = index % len(order)
            turn = order[start:] + order[:start]
            yield {key: _time_once(variants[key], batch, clock, device) for key in turn}


def _time_once(model: nn.Module, batch: dict[str, Tensor], clock: Callable[[], int], device: str) -> float:
    _wait(device)
    begin = clock()
    model(**batch)
    _wait(device)
    return (clock() - begin) / 1e6


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
