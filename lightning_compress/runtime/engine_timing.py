"""Measuring which backend is fastest for a shape, and telling what was chosen.

The next chapter is :mod:`lightning_compress.runtime.backends`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from lightning_compress.runtime.fast_linear import Engine

__all__ = ["BackendReport", "Timing", "fastest", "time_engines"]

ALMOST = 1.05
"""A backend that is within 5 % of the fastest, and comes before it, is chosen: what is left is noise."""
_ROUNDS, _WARM_UP = 7, 1


@dataclass(frozen=True)
class Timing:
    """What was measured for layers of one shape."""

    num_inputs: int
    num_outputs: int
    """Of one product; of query, key and value together where they run as one."""
    rows: tuple[int, ...]
    seconds: dict[str, tuple[float, ...]]
    """Of each backend, for each number of rows."""
    chosen: str

    def __str__(self) -> str:
        columns = ", ".join(
            f"{name} {'/'.join(f'{1e6 * second:.0f}' for second in seconds)}"
            for name, seconds in self.seconds.items()
        )
        rows = "/".join(str(count) for count in self.rows)
        return (
            f"{self.num_inputs} -> {self.num_outputs}: {self.chosen} (microseconds at {rows} rows: {columns})"
        )


@dataclass(frozen=True)
class BackendReport:
    """Which backend computes which layer, and why; give it to ``use_backend`` to choose the same without measuring."""

    choices: dict[str, str]
    """Backend of each layer, by path."""
    states: torch.dtype | None = None
    """Dtype between the operators of a packed encoder; None for that of the model."""
    timings: list[Timing] = field(default_factory=list)
    """One for each shape; empty if nothing was measured."""
    one_factor: bool = False
    """Whether ``"int8"`` rounds all rows of a call by one factor."""

    @property
    def summary(self) -> str:
        """How many layers each backend computes, in one line."""
        counts = ", ".join(
            f"{name} for {count}" for name, count in Counter(self.choices.values()).most_common()
        )
        states = f"; {str(self.states).removeprefix('torch.')} between operators" if self.states else ""
        factor = "; one factor for all rows" if self.one_factor and "int8" in self.choices.values() else ""
        return f"backends of {len(self.choices)} quantised linears: {counts or 'reference'}{factor}{states}"

    def __str__(self) -> str:
        return "\n  ".join([self.summary, *map(str, self.timings)])


def time_engines(
    engines: Mapping[str, Sequence[Engine]], num_inputs: int, rows: Sequence[int], like: Tensor
) -> dict[str, tuple[float, ...]]:
    """Return the seconds of a call by backend and number of rows: the least of several rounds, taken in turns.

    A round calls layer after layer, as a model does: weights are then not found in the processor's nearest cache,
    where a single layer called again and again would find them.

    Args:
        engines: What to compare: for each backend the engines of some layers of one shape.
        num_inputs: Inputs of the layer.
        rows: Numbers of rows to measure at.
        like: A tensor of the device and dtype of inputs.
    """
    generator = torch.Generator().manual_seed(0)
    least: dict[str, list[float]] = {name: [] for name in engines}
    with torch.inference_mode():
        for count in rows:
            x_MK = torch.randn(count, num_inputs, generator=generator).to(like)
            seconds = {name: float("inf") for name in engines}
            for number in range(_WARM_UP + _ROUNDS):
                for name, layers in engines.items():
                    taken = sum(_seconds(engine, x_MK) for engine in layers) / len(layers)
                    if number >= _WARM_UP:
                        seconds[name] = min(seconds[name], taken)
            for name in engines:
                least[name].append(seconds[name])
    return {name: tuple(values) for name, values in least.items()}


def fastest(seconds: Mapping[str, Sequence[float]]) -> str:
    """Return the backend with the least time, the geometric mean over numbers of rows; of equals, the first.

    Raises:
        ValueError: If there is none.

    Example:
        >>> fastest({"int8": (1.0, 4.0), "bf16": (2.0, 1.0)}), fastest({"int8": (1.02,), "bf16": (1.0,)})
        ('bf16', 'int8')
    """
    if not seconds:
        raise ValueError("nothing was measured: name at least one backend")
    means = {name: prod(values) ** (1 / len(values)) for name, values in seconds.items()}
    least = min(means.values())
    return next(name for name, mean in means.items() if mean <= ALMOST * least)


def _seconds(engine: Engine, x_MK: Tensor) -> float:
    if x_MK.is_cuda:
        torch.cuda.synchronize()
    # what one thread computes takes no longer because others are at work
    clock = time.thread_time if not x_MK.is_cuda and torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    engine(x_MK)
    if x_MK.is_cuda:
        torch.cuda.synchronize()
    return clock() - started
