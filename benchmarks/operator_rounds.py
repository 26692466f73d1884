"""Timing of calls that last microseconds: repeated until a sample is long enough, in turns, ratios paired by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Call", "cell", "microseconds_in_turns"]

Call = Callable[[], Any]

SAMPLE_SECONDS = 0.002
"""How long one sample lasts at least."""

_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def microseconds_in_turns(
    calls: dict[str, Call], rounds: int, clock: str = "wall", device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the microseconds of a call, by name and round; each round begins with another one.

    Args:
        calls: What is timed.
        rounds: Samples of each.
        clock: ``"wall"``, or ``"cpu"`` for a crowded machine.
        device: Where it runs; samples end when it has finished.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with torch.inference_mode():
        repeats = {name: _repeats(call, device) for name, call in calls.items()}
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds = _seconds(calls[name], repeats[name], clock, device)
                samples[name].append(seconds / repeats[name] * 1e6)
    return samples


def cell(samples: dict[str, list[float]], name: str, base: str) -> str:
    """Return the median of the samples and, in brackets, the median of their ratios to those of ``base``."""
    ratio = statistics.median(own / other for own, other in zip(samples[name], samples[base], strict=True))
    median = statistics.median(samples[name])
    return f"{median:.{0 if median >= 100 else 1}f}" + ("" if name == base else f" ({ratio:.2f})")


def _repeats(call: Call, device: str) -> int:
    _seconds(call, 3, "wall", device)  # compiles, warms
    return max(1, round(SAMPLE_SECONDS / (_seconds(call, 3, "wall", device) / 3)))


def _seconds(call: Call, repeats: int, clock: str, device: str) -> float:
    now = _CLOCKS[clock]
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = now()
    for _ in range(repeats):
        call()
    wait()
    return now() - start
