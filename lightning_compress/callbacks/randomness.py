"""Random state in checkpoints, as plain values, so that a resumed run draws what the uninterrupted one would."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["RandomStream", "read_random_state", "write_random_state"]


class RandomStream:
    """The random numbers of training, the same whether a run is interrupted or not.

    Every epoch's stream is seeded from where the one before ended, so that it does not matter which loaders were
    set up and which validation ran in between: a resumed run differs in that. A run that stops inside a batch does
    that batch again, with the state of its start. Numbers that a loader draws while it reads are the loader's to
    restore.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._started: dict[str, Any] | None = None
        self._ended: dict[str, Any] | None = None

    def state_dict(self, *, in_batch: bool) -> dict[str, Any]:
        """Return the state to go on with; ``in_batch`` says that the running batch is not learned from yet."""
        if in_batch and self._started is not None:
            return {"in_batch": True, "state": self._started}
        return {"in_batch": False, "state": self._ended or read_random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a saved state until training is where it was."""
        self._loaded = state

    def start_fit(self) -> None:
        """Take over a loaded state, for what happens before the first batch."""
        if self._loaded is not None:
            write_random_state(self._loaded["state"])
        self._started, self._ended = None, read_random_state()

    def start_batch(self, batch_idx: int) -> None:
        """Take over a loaded state, or begin the stream of an epoch."""
        starts_epoch = batch_idx == 0 and not (self._loaded or {}).get("in_batch")
        if self._ended is not None and (starts_epoch or self._loaded is not None):
            write_random_state(self._ended)
        if starts_epoch:
            _seed_all(int(torch.empty((), dtype=torch.int64).random_()))
        self._loaded = self._ended = None
        self._started = read_random_state()

    def end_batch(self) -> None:
        """Note the state after a batch."""
        self._started, self._ended = None, read_random_state()

    def end_validation(self) -> None:
        """Go on as if validation had not been."""
        if self._ended is not None:
            write_random_state(self._ended)


def read_random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's generators as tensors, tuples, strings and numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = (
        str(kind),
        torch.from_numpy(np.asarray(keys).astype(np.int64)),
        position,
        has_gauss,
        cached,
    )
    state = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def write_random_state(state: dict[str, Any]) -> None:
    """Take over :func:`read_random_state`; CUDA states only where as many devices are there."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
