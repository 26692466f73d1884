"""Optimizers and surgery: re-point groups that hold replaced parameters, and check that nothing is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_compress.compressor import Compressor

__all__ = ["check_every_parameter_is_optimized", "forget_curvature", "optimizers_in", "repair_optimizers"]

_NAMED_AT_MOST = 5


def optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """Yield every optimizer in whatever ``configure_optimizers`` returned."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, dict):
        yield from optimizers_in(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from optimizers_in(item)


def repair_optimizers(configured: Any, compressor: Compressor, module: nn.Module) -> Any:
    """Edit groups in place: stale parameters give way to their successors, newcomers join, auxiliary ones leave.

    Editing in place keeps learning-rate schedulers valid (the number of groups and their options stay the same), and
    optimizers like LBFGS that hold on to the list of the first group.
    """
    successors = compressor.successors()
    auxiliary = {id(p) for p in compressor.auxiliary_parameters()}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer in optimizers_in(configured):
        placed = {id(p) for group in optimizer.param_groups for p in group["params"]} | auxiliary
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in successors:
                    optimizer.state.pop(parameter, None)
            given = group.get("param_names", [""] * len(group["params"]))
            live = list(_live(zip(group["params"], given, strict=True), successors, auxiliary, placed))
            group["params"][:] = [parameter for parameter, _ in live]
            if "param_names" in group:
                group["param_names"] = [_renamed(names.get(id(p), name), name) for p, name in live]
    _seat(compressor.newcomers(), [g for o in optimizers_in(configured) for g in o.param_groups], names)
    return configured


def _seat(
    newcomers: Iterable[tuple[nn.Parameter, nn.Parameter]],
    groups: list[dict[str, Any]],
    names: dict[int, str],
) -> None:
    """Let newcomers that are in no group join that of the parameter they are like, if it is in one."""
    placed = {id(p) for group in groups for p in group["params"]}
    for newcomer, like in newcomers:
        group = next((g for g in groups if any(p is like for p in g["params"])), None)
        if group is not None and newcomer.requires_grad and id(newcomer) not in placed:
            group["params"].append(newcomer)
            if "param_names" in group:
                group["param_names"].append(names[id(newcomer)])


def check_every_parameter_is_optimized(
    module: nn.Module, optimizers: Iterable[Optimizer], auxiliary: Iterable[nn.Parameter]
) -> None:
    """Raise unless every trainable parameter is in exactly one optimizer.

    Raises:
        RuntimeError: Naming parameters that no optimizer or more than one holds.
    """
    held: dict[int, int] = {id(p): 1 for p in auxiliary}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                held[id(parameter)] = held.get(id(parameter), 0) + 1
    trainable = {name: held.get(id(p), 0) for name, p in module.named_parameters() if p.requires_grad}
    missing = [name for name, count in trainable.items() if count == 0]
    double = [name for name, count in trainable.items() if count > 1]
    if missing:
        raise RuntimeError(
            f"{len(missing)} trainable parameters are in no optimizer and would never change: {_some(missing)}. Give "
            "them to an optimizer in configure_optimizers, or freeze them with requires_grad_(False)"
        )
    if double:
        raise RuntimeError(
            f"{len(double)} trainable parameters are in more than one optimizer group: {_some(double)}. Keep each in "
            "one group of one optimizer"
        )


def forget_curvature(optimizers: Iterable[Optimizer]) -> None:
    """Let LBFGS, whose state is of all parameters together, start anew after some changed their meaning."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            optimizer.state.clear()


def _live(
    parameters: Iterable[tuple[nn.Parameter, str]],
    successors: dict[int, list[nn.Parameter]],
    auxiliary: set[int],
    placed: set[int],
) -> Iterator[tuple[nn.Parameter, str]]:
    for parameter, name in parameters:
        if id(parameter) in successors:
            for heir in successors[id(parameter)]:
                if id(heir) not in placed:
                    placed.add(id(heir))
                    yield heir, name
        elif id(parameter) not in auxiliary:
            yield parameter, name


def _renamed(full: str, before: str) -> str:
    """Return the full name, from where the user's own naming of the same layer begins."""
    at = full.rfind(before.rpartition(".")[0])
    return full[max(at, 0) :] if "." in before else full


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more
