"""Which batches the separate pass for importance sees: a fixed sample of those that training has seen, by a seed.

And what the pass costs in time.

Nothing is asked of the user's data: the model's own training passes are watched, and every one of them up to the first
step of the schedule is as likely to be kept as any other. The next chapter is
:mod:`lightning_compress.methods.width_calibration`.

Shape legend: B batch, T padded length.
"""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["BatchRecorder", "PassClock", "check_labels", "lot"]


class _Kept(NamedTuple):
    """A training pass."""

    lot: float
    index: int
    batch: dict[str, Tensor]


def lot(seed: int, index: int) -> float:
    """Return the number in [0, 1) that a training pass draws; the same in each run and process.

    Args:
        seed: Which sample is drawn.
        index: How many passes were before it.

    Example:
        >>> lot(0, 1) == lot(0, 1), lot(0, 1) == lot(0, 2)
        (True, False)
    """
    return random.Random(f"{seed}/{index}").random()


class BatchRecorder:
    """Keeps what a model was called with in some of its training passes: those of the lowest lots.

    So the sample is drawn without replacement, evenly from all passes until :meth:`fix`, whatever their number; it
    needs no generator whose state would have to be saved, and the k-th pass is in it on all processes or on none.

    Args:
        size: How many batches are kept; 0 records nothing.
        seed: Which ones.

    Departs from the paper: the official subset is drawn with replacement, and anew at each step (specification §6-A,
    D5).
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.count = 0
        """Training passes that were counted."""
        self.is_fixed = False
        """Whether passes to come leave the sample as it is, once it is full."""
        self._kept: list[_Kept] = []
        self._recent: list[_Kept] = []
        self._num_recent = 0
        self._is_paused = False
        self._handle: RemovableHandle | None = None

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """The sample, in the order of training."""
        return [kept.batch for kept in sorted(self._kept, key=lambda kept: kept.index)]

    def attach(self, model: nn.Module) -> BatchRecorder:
        """Listen to a model."""
        if self.size:
            self._handle = model.register_forward_pre_hook(self, with_kwargs=True)
        return self

    def detach(self) -> None:
        """Stop listening, and forget everything."""
        self._kept, self._recent, self._num_recent = [], [], 0
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Take recorders off a model; nothing happens where there are none."""
        hooks = model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, BatchRecorder)]:
            del hooks[key]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the tensors of a training pass; they become part of the state by :meth:`settle`.

        Raises:
            ValueError: If there are no labels, so that no loss could be computed later.
        """
        if not (module.training and torch.is_grad_enabled()) or self._is_paused or self._is_closed:
            return
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        check_labels(given)
        index = self.count + self._num_recent
        self._num_recent += 1
        drawn = lot(self.seed, index)
        if len(self._kept) < self.size or drawn < self._kept[-1].lot:
            batch = {name: v.detach().clone() for name, v in given.items() if isinstance(v, Tensor)}
            self._recent.append(_Kept(drawn, index, batch))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not listen for a while."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def settle(self) -> None:
        """Count what was noted; a run that stops inside a batch does that batch again."""
        if not self.is_fixed:
            self._kept = sorted([*self._kept, *self._recent], key=lambda kept: kept.lot)[: self.size]
        else:  # importance was read off what is there: it stays, and what is missing comes in the order of training
            self._kept = [*self._kept, *self._recent][: self.size]
        self.count += self._num_recent
        self._recent, self._num_recent = [], 0

    def fix(self) -> None:
        """Stay with the present sample; one that is not full yet goes on until it is."""
        self.is_fixed = True

    def state_dict(self) -> dict[str, Any]:
        """Return the sample, as plain tensors on the CPU."""
        kept = [[k.index, {name: value.cpu() for name, value in k.batch.items()}] for k in self._kept]
        return {"count": self.count, "is_fixed": self.is_fixed, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over :meth:`state_dict`."""
        self.count, self.is_fixed = state["count"], state["is_fixed"]
        self._kept = [_Kept(lot(self.seed, index), index, dict(batch)) for index, batch in state["kept"]]
        self._recent, self._num_recent = [], 0

    @property
    def _is_closed(self) -> bool:
        return self.is_fixed and len(self._kept) == self.size


class PassClock:
    """How long separate passes take, and what share that is of all time since the first :meth:`start`.

    Time is that of this process: a resumed run counts from its resumption on.

    Example:
        >>> clock = PassClock()
        >>> clock.seconds, clock.share
        (0.0, 0.0)
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began: float | None = None

    def start(self) -> None:
        """Training goes on; the first call is its beginning."""
        if self._began is None:
            self._began = time.perf_counter()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count the time within, with what the device is given to do."""
        _wait_for(device)
        began = time.perf_counter()
        try:
            yield
        finally:
            _wait_for(device)
            self.seconds += time.perf_counter() - began

    @property
    def share(self) -> float:
        """Share of the time since the beginning, in [0, 1]."""
        total = 0.0 if self._began is None else time.perf_counter() - self._began
        return min(self.seconds / total, 1.0) if total > 0 else 0.0


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_labels(given: Mapping[str, Any]) -> Tensor:
    """Return the labels among the arguments of a model's forward.

    Raises:
        ValueError: If there are none.
    """
    labels = given.get("labels")
    if labels is None:
        raise ValueError(
            f"calibration_batches needs labels to compute a loss, but the model was called with {sorted(given)}: pass "
            "labels to the model, or set calibration_batches=0 to read gradients of the ordinary steps"
        )
    return labels
