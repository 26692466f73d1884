"""A bare loop that trains a tiny model while its widths fall."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.auxiliary import AuxiliaryOptimizer
from lightning_compress.losses.width_slimming import terms
from lightning_compress.methods.width_slimming import (
    WidthSlimmingConfig,
    WidthSlimmingHandle,
    prepare,
    update,
)
from tests.toys import ToyTexts, tiny_bert

__all__ = ["batch", "logits", "slimmed"]


def batch(size: int = 8) -> dict[str, Tensor]:
    rows = [ToyTexts()[i] for i in range(size)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch()["input_ids"]).logits


def slimmed(
    length: int = 10, /, until: int | None = None, model: nn.Module | None = None, **settings: Any
) -> WidthSlimmingHandle:
    """A handle after ``until`` of ``length`` steps of training."""
    model = tiny_bert() if model is None else model
    handle = prepare(model, WidthSlimmingConfig(**settings))
    auxiliary = AuxiliaryOptimizer([handle])
    own = {id(parameter) for parameter in auxiliary.parameters}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if id(p) not in own], lr=1e-3)
    model.train()
    for step in range(length if until is None else until):
        update(handle, step / length)
        handle.end_pass()
        loss = model(**batch()).loss + sum(terms(handle).values())
        loss.backward()
        handle.end_pass()
        handle.read_gradients()
        auxiliary.step()
        optimizer.step()
        optimizer.zero_grad()
    return handle
