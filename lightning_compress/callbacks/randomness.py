"""Random state in checkpoints, as plain values, so that a resumed run draws what the uninterrupted one would."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["read_random_state", "write_random_state"]


def read_random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's generators as tensors, tuples, strings and numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached)
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
