"""The private optimizer of auxiliary parameters: thresholds and multipliers with a learning rate of their own.

They get no weight decay, stay out of the user's parameter groups and schedulers, and rest whenever their method
says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_compress.methods import AuxiliaryGroup, MethodHandle

__all__ = ["AuxiliaryOptimizer"]


class AuxiliaryOptimizer:
    """Adam over the auxiliary parameters of several methods, created at the first step.

    Creating it late lets the model move to its device first; a state loaded before that waits.
    """

    def __init__(self, handles: Iterable[MethodHandle]) -> None:
        self.handles = list(handles)
        self._optimizer: torch.optim.Adam | None = None
        self._pending: dict[str, Any] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All auxiliary parameters, method by method."""
        return [parameter for group in self._groups() for parameter in group.parameters]

    @property
    def optimizer(self) -> torch.optim.Adam | None:
        """The optimizer itself; None where no method has auxiliary parameters."""
        if self._optimizer is None and self.parameters:
            groups = [{"params": group.parameters} for group in self._groups()]
            self._optimizer = torch.optim.Adam(groups, lr=0.0)
            if self._pending is not None:
                self._optimizer.load_state_dict(self._pending)
                self._pending = None
        return self._optimizer

    def step(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Apply the gathered gradients with the learning rates the methods ask for, then clear them.

        Args:
            scaler: The fp16 gradient scaler whose scale the gradients carry, if any.
        """
        optimizer = self.optimizer
        if optimizer is None:
            return
        for group, (parameters, lr, _) in zip(optimizer.param_groups, self._groups(), strict=True):
            group["lr"] = lr
            if lr == 0.0:
                self._clear(parameters)
        if any(p.grad is not None for p in self.parameters):
            if scaler is not None:
                scaler.unscale_(optimizer)
            for parameters, _, max_norm in self._groups():
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, max_norm)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        self._clear(self.parameters)

    def _groups(self) -> list[AuxiliaryGroup]:
        return [group for handle in self.handles for group in handle.auxiliary_groups()]

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drop the moments of some parameters."""
        optimizer = self._optimizer if self._pending is None else self.optimizer
        if optimizer is not None:
            for parameter in parameters:
                optimizer.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the optimizer's state, or None where there is nothing to keep."""
        if self._pending is not None:
            return self._pending
        return None if self._optimizer is None else self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over a state at the next use, on the device the parameters then live on."""
        self._optimizer, self._pending = None, copy.deepcopy(state)

    @staticmethod
    def _clear(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None
