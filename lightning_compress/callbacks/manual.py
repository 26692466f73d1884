"""Manual optimization, where users call ``backward`` and ``step`` themselves, several times a batch or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.compressor import Compressor

__all__ = ["add_gradients", "trains_compressed_layers"]


def add_gradients(terms: Iterable[Tensor], parameters: Iterable[nn.Parameter], scale: float = 1.0) -> None:
    """Add the gradients of loss terms to those of the parameters, beside the user's own ``backward``.

    The user's loss and its graph are left alone: his ``backward`` is still to come. No hook on a parameter fires, so
    that DDP, which counts one gradient per parameter and pass, sends the sum of both when the user's arrives.

    Args:
        terms: Scalar loss terms.
        parameters: What they may depend on.
        scale: Factor of the fp16 gradient scaler.
    """
    total = sum(terms, start=torch.zeros(()))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not total.requires_grad:
        return
    gradients = torch.autograd.grad(total * scale, trained, retain_graph=True, allow_unused=True)
    for parameter, gradient in zip(trained, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def trains_compressed_layers(
    optimizer: Optimizer, optimizers: Sequence[Optimizer], compressor: Compressor
) -> bool:
    """Whether the thresholds step with this one of several optimizers: it holds parameters of their layers.

    Where no optimizer does, as with adapters on frozen layers, it is whichever holds parameters of the model.
    """
    if len(optimizers) < 2:
        return True
    auxiliary = {id(p) for p in compressor.auxiliary_parameters()}
    layers = [list(module.parameters(recurse=False)) for module in compressor.model.modules()]
    beside = {id(p) for own in layers if any(id(p) in auxiliary for p in own) for p in own} - auxiliary
    if not any(_held(other) & beside for other in optimizers):
        beside = {id(p) for p in compressor.trainable_parameters()}
    return bool(_held(optimizer) & beside)


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
