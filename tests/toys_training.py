"""The bare loop that trains a compressor's model, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_compress.compressor import Compressor

__all__ = ["training_steps"]


def training_steps(
    compressor: Compressor, batch_of: Callable[[int], Mapping[str, Tensor]], steps: int, lr: float = 1e-3
) -> Iterator[Tensor]:
    """Train for a number of steps, each on its own batch; yield the loss after each, and leave in evaluation."""
    optimizer = torch.optim.AdamW(compressor.trainable_parameters(), lr=lr)
    compressor.model.train()
    for step in range(steps):
        compressor.update(step / steps)
        compressor.begin_step()
        task_loss = compressor.task_weight * compressor.model(**batch_of(step)).loss
        loss = task_loss + sum(compressor.take_loss_terms().values())
        loss.backward()
        compressor.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()
    compressor.model.eval()
