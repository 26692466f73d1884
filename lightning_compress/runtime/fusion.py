"""Linears that read the same input, run as one product without a second copy of their weights.

The weights become views of one storage, so that updates in place (optimizers, ``load_state_dict``) reach both. The
next chapter is :mod:`lightning_compress.runtime.block`.

Shape legend: D input size, S output sizes of all linears together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fused", "FusedLinears", "is_plain"]


@dataclass(frozen=True)
class Fused:
    """The weights of several linears in one tensor; the linears' own are views of it."""

    weight_SD: Tensor
    """All weights, one linear's after the other's."""
    bias_S: Tensor | None
    """All biases."""
    sizes: tuple[int, ...]
    """Output size of each linear."""
    addresses: tuple[int, ...]
    """Where in memory the linears' parameters were put."""


class FusedLinears:
    """Keeps the fused form of the same linears as long as it is true, and makes it anew when it is not.

    Casting, moving or copying a model gives each weight a storage of its own again; that is noticed by the address.
    Copies and pickles leave the fused form out.

    Example:
        >>> linears = [nn.Linear(2, 3), nn.Linear(2, 1)]
        >>> with torch.no_grad():
        ...     fused = FusedLinears().of(linears)
        ...     linears[1].weight.fill_(7.0)[0, 0].item(), fused.weight_SD[3, 0].item()
        (7.0, 7.0)
    """

    def __init__(self) -> None:
        self._fused: Fused | None = None

    def of(self, modules: Sequence[nn.Module]) -> Fused | None:
        """Return the fused form, or None where the linears have to run on their own.

        That is where one is not a plain linear, where gradients of the weights are wanted, while a graph is being
        traced, and where the weights belong to someone else's storage (sharded or shared between processes).
        """
        if torch.compiler.is_compiling() or not all(map(is_plain, modules)):
            return None
        weights: list[Any] = [module._parameters["weight"] for module in modules]
        biases: list[Any] = [bias for module in modules if (bias := module._parameters["bias"]) is not None]
        parameters = weights + biases
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return None
        fused = self._fused
        if fused is None or fused.addresses != tuple([parameter.data_ptr() for parameter in parameters]):
            self._fused = fused = _fuse(weights, biases)
        return fused

    def __getstate__(self) -> dict[str, Any]:
        return {"_fused": None}


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is calling ``F.linear``: exactly ``nn.Linear``, without hooks or a patched forward."""
    return (
        type(module) is nn.Linear
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def _fuse(weights: list[Any], biases: list[Any]) -> Fused | None:
    """Put the parameters into one storage, unless they cannot be moved."""
    groups = [weights, biases] if biases else [weights]
    if any(len(group) != len(weights) for group in groups) or not all(
        _can_move(parameter, group[0]) for group in groups for parameter in group
    ):
        return None
    with torch.inference_mode(False), torch.no_grad():
        wholes = [torch.cat([parameter.data for parameter in group]) for group in groups]
        sizes = tuple(parameter.shape[0] for parameter in weights)
        for whole, group in zip(wholes, groups, strict=True):
            for parameter, view in zip(group, whole.split(sizes), strict=True):
                parameter.data = view
    addresses = tuple(parameter.data_ptr() for group in groups for parameter in group)
    return Fused(wholes[0], wholes[1] if len(wholes) > 1 else None, sizes, addresses)


def _can_move(parameter: Any, first: Any) -> bool:
    return (
        type(parameter) is nn.Parameter
        and (parameter.dtype, parameter.device) == (first.dtype, first.device)
        and not parameter.is_inference()
        and not parameter.is_shared()
        and not hasattr(parameter, "_fsdp_flattened")
    )
