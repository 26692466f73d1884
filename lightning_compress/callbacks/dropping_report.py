"""What the report needs of a run that drops tokens: texts to measure on, and what the training passes cost.

:mod:`lightning_compress.callbacks.report` asks; what is measured on the texts in the end is in
:mod:`lightning_compress.report.dropping_measurement`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_compress.compressor import Compressor
from lightning_compress.methods import MethodHandle
from lightning_compress.methods.token_dropping import flops_ratio_of_pass

__all__ = ["SeenBatches", "dropping_handle", "dropping_in_step"]

_MOST_BATCHES = 10
_MOST_TEXTS = 320


class SeenBatches:
    """The first validation batches of a run, on the CPU, for use after the data are gone."""

    def __init__(self) -> None:
        self._batches: dict[int, dict[str, Tensor]] = {}

    def see(self, batch: Any, index: int) -> None:
        """Keep the batch with this index, if it has ``input_ids``, was not seen, and there is room."""
        if index in self._batches or len(self._batches) >= _MOST_BATCHES:
            return
        ids_BT = batch.get("input_ids") if isinstance(batch, Mapping) else None
        room = _MOST_TEXTS - sum(len(kept["input_ids"]) for kept in self._batches.values())
        if not isinstance(ids_BT, Tensor) or ids_BT.dim() != 2 or room < 1:
            return
        size = ids_BT.shape[0]
        tensors = {n: v for n, v in batch.items() if isinstance(v, Tensor) and v.shape[:1] == (size,)}
        if "labels" not in tensors and "label" in tensors:
            tensors["labels"] = tensors.pop("label")
        self._batches[index] = {name: value[:room].detach().cpu().clone() for name, value in tensors.items()}

    def look_up(self, trainer: Trainer) -> None:
        """Where validation never ran, read the first batches of its data; random numbers stay as they are."""
        loaders = CombinedLoader(trainer.val_dataloaders or [], "sequential").flattened
        limits = trainer.num_val_batches
        if self._batches or not loaders or not limits:
            return
        with torch.random.fork_rng(devices=[]):
            for index, batch in enumerate(islice(loaders[0], int(min(_MOST_BATCHES, limits[0])))):
                self.see(batch, index)

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """The batches in the order of the data."""
        return [self._batches[index] for index in sorted(self._batches)]


def dropping_handle(compressor: Compressor) -> MethodHandle | None:
    """Return the handle of the method that drops tokens, if one is prepared."""
    return next((handle for handle in compressor.handles.values() if "tokens_kept" in handle.metrics()), None)


def dropping_in_step(handle: Any, batch: Any = None) -> tuple[float, dict[str, float]]:
    """Return the share of FLOPs that the latest pass spent, and what a step record says of tokens.

    The share is of the model as it is now, with every token kept.

    Args:
        handle: Of a method that drops tokens.
        batch: What the pass was over; looked at where the method itself measures tokens, not FLOPs.
    """
    metrics = handle.metrics()
    known = {name: metrics[name] for name in ("tokens_kept", "ratio", "threshold") if name in metrics}
    if handle.config.target is not None:
        known["target"] = handle.goal.scheduled(handle.progress)
    is_of_flops = handle.config.target_tokens is None
    return (metrics["ratio"] if is_of_flops else flops_ratio_of_pass(handle, _lengths(batch))), known


def _lengths(batch: Any) -> Tensor | None:
    """Tokens of each sequence of a batch; None where it does not tell."""
    ids_BT = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids_BT, Tensor):
        return None
    mask_BT = batch.get("attention_mask")
    return (torch.ones_like(ids_BT) if mask_BT is None else mask_BT.bool()).sum(dim=1)
