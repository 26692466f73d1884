"""How examples leave early: what the packed engine asks of exits, and what all rules of leaving have in common.

The rules themselves are the next chapter, :mod:`lightning_compress.nn.exit_rules`.

Shape legend: B examples that are still there, N rows, C classes, D hidden size, K exits before the last.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from lightning_compress.nn.segments import Segments

__all__ = ["ExitPolicy", "ExitRule", "ExitRuleName", "PassMemory"]

_SLACK = 2e-6

ExitRuleName = Literal["entropy", "max_prob", "margin", "patience", "learned"]
"""Names of the rules."""


class PassMemory(threading.local):
    """What is known during one pass, by each thread for itself: servers run one model in several. Copies are empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _RuleMemory(PassMemory):
    now: tuple[float, frozenset[int]] | None = None
    before_B: Tensor | None = None
    count_B: Tensor | None = None


class ExitPolicy(Protocol):
    """Lets examples leave the packed engine between layers; holds exit heads and a rule, and the logits of who left."""

    @property
    def rule(self) -> ExitRule:
        """When examples leave."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers after which there is an exit, ascending, from 0; the last layer is not among them."""
        ...

    def start(self, segments: Segments) -> None:
        """Forget the latest pass: one with these examples begins."""
        ...

    def look(self, layer: int, hidden_ND: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Return the logits ``[B, C]`` of the exit after ``layer`` and the states ``[B, D]`` that the rule may read.

        Args:
            layer: One of :attr:`layers`.
            hidden_ND: Rows that leave the layer, exactly those of ``segments``.
            segments: Which example each row belongs to; ``segments.example_B`` numbers those still there.
        """
        ...

    def check(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        """Return which examples stay, bool ``[B]``; None if all do. The logits of those that leave are remembered.

        Arguments are those of :meth:`look`; ``layer`` may be one without an exit, or one the rule does not ask.
        """
        ...


class ExitRule(nn.Module):
    """Base of the rules: chosen exits, a threshold, and what is to be remembered from exit to exit of a pass.

    Both are buffers, so they are saved with the model and can be changed after loading. A pass is
    ``start``, then at each exit ``leaves`` and, where somebody left, ``keep``.

    Args:
        layers: Layers after which there is an exit, ascending, from 0; the last layer is not among them.
        threshold: What measures are compared with; None is :attr:`off`.
        num_labels: Logits of each exit, which bound what some rules can measure; None if they are not known.

    Raises:
        ValueError: If the threshold is out of range.
    """

    name: ClassVar[ExitRuleName]
    off: ClassVar[float]
    """The threshold at which nobody leaves."""
    is_below: ClassVar[bool]
    """Whether examples leave below the threshold; otherwise above."""
    looks_back: ClassVar[bool] = False
    """Whether a measure depends on what exits before said, so that none can be left out."""

    threshold: Tensor
    is_checked_K: Tensor
    """Which exits are worth asking, bool, in the order of :attr:`layers`; a rule that looks back asks all."""

    def __init__(
        self, layers: Sequence[int], threshold: float | None = None, *, num_labels: int | None = None
    ) -> None:
        super().__init__()
        self.layers, self.num_labels = tuple(layers), num_labels
        threshold = self.off if threshold is None else threshold
        self.register_buffer("threshold", torch.tensor(self.checked(threshold), dtype=torch.float32))
        self.register_buffer("is_checked_K", torch.ones(len(self.layers), dtype=torch.bool))
        self._pass = _RuleMemory()

    def checked(self, threshold: float) -> float:
        """Return a threshold that is in range.

        Raises:
            ValueError: If it is not.
        """
        low, high = self._range()
        if not low - self._slack(low) <= threshold <= high + self._slack(high):
            raise ValueError(
                f"threshold={threshold} of the exit rule {self.name!r} is outside [{low:.4g}, {high:.4g}], what it "
                f"measures{'' if self.num_labels is None else f' of {self.num_labels} classes'}: give one inside; "
                f"{self.off:g} lets nobody leave early"
            )
        return float(threshold)

    def nearest(self, threshold: float) -> float:
        """Return the nearest threshold in range."""
        low, high = self._range()
        return min(max(threshold, low - self._slack(low)), high + self._slack(high))

    def asked_layers(self) -> list[int]:
        """Return the layers after which somebody might leave, so that the exit there has to be run."""
        return [] if float(self.threshold) == self.off else self.checked_layers()

    def checked_layers(self) -> list[int]:
        """Return the layers whose exits are asked as soon as the threshold lets anyone leave."""
        if self.looks_back:
            return list(self.layers)
        return [layer for layer, asked in zip(self.layers, self.is_checked_K.tolist(), strict=True) if asked]

    def start(self, batch_size: int, device: torch.device | str) -> None:
        """Begin a pass over some examples, none of which has met an exit; the threshold is read once."""
        del batch_size, device
        self._pass.now = float(self.threshold), frozenset(self.asked_layers())

    def is_asked(self, layer: int) -> bool:
        """Whether ``layer`` is among :meth:`asked_layers` of this pass."""
        return layer in self._current()[1]

    def leaves(self, layer: int, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
        """Return who leaves after ``layer``, bool ``[B]``; never an example with a logit that is no number.

        Args:
            layer: One of :attr:`layers`; exits are met in ascending order.
            logits_BC: What the exit says of the examples still there, in their order.
            hidden_BD: The states it says that from; read by ``learned`` alone.

        Raises:
            ValueError: If there is one logit and the rule compares classes.
        """
        measure_B = self.measure(layer, logits_BC, hidden_BD)
        fires_B = self.fires(measure_B, self._current()[0])
        return fires_B if self.is_asked(layer) else torch.zeros_like(fires_B)

    @abstractmethod
    def measure(self, layer: int, logits_BC: Tensor, hidden_BD: Tensor) -> Tensor:
        """Return what is compared with the threshold, ``[B]``; arguments and errors are those of :meth:`leaves`."""

    def fires(self, measure_B: Tensor, threshold: float) -> Tensor:
        """Return whose measure is strictly beyond a threshold; not a number is not."""
        return measure_B < threshold if self.is_below else measure_B > threshold

    def keep(self, stay_B: Tensor) -> None:
        """Forget the examples that left.

        Args:
            stay_B: True for examples that go on, of those that were there at the latest exit.
        """

    def _range(self) -> tuple[float, float]:
        """Return the least and the largest threshold that lets some leave and others stay."""
        return 0.0, 1.0

    def _slack(self, bound: float) -> float:
        """Return how far beyond a bound everybody leaves, examples of just that measure too."""
        return 0.0 if bound in (0.0, 1.0, math.inf) else _SLACK * (1.0 + bound)

    def _current(self) -> tuple[float, frozenset[int]]:
        now = self._pass.now
        if now is None:
            raise RuntimeError("the exit rule was asked outside a pass: call start(batch_size, device) first")
        return now

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExitRule:
        """Cast and move as usual, but keep the threshold exact: 0.999 would be 1 in half precision."""
        exact = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != exact.dtype:
            self.threshold = exact.to(self.threshold.device)
        return self
