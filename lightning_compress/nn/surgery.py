"""Surgery: replace modules by path, and remember enough to undo it and to re-point optimizers.

Every structural change goes through a :class:`Ledger`. It knows which parameters a replacement made stale and
which ones took their place (for optimizers that were built too early), and it can put blank originals back
(for checkpoints that hold an earlier, larger structure).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.places import (
    carry_hooks,
    get_module,
    names_of,
    remove_hook,
    replace_module,
    staying_hooks,
    tie,
    unwrap_adapter,
)

__all__ = [
    "Ledger",
    "carry_hooks",
    "dense_weight",
    "get_module",
    "is_linear",
    "linear_shape",
    "names_of",
    "new_linear",
    "remove_hook",
    "replace_module",
    "successors_of",
    "tie",
    "unwrap_adapter",
]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a dense affine map: exactly ``nn.Linear`` or GPT-2's transposed ``Conv1D``."""
    return type(module) is nn.Linear or type(module) is Conv1D


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return ``(in_features, out_features)`` of a linear-like module.

    Raises:
        TypeError: If the module is not linear-like.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not all(isinstance(size, int) for size in shape):
        raise TypeError(
            f"{type(module).__name__} is not a linear layer: it has no in_features and out_features"
        )
    return shape  # type: ignore[return-value]


def dense_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight as ``[out, in]``, transposing GPT-2's ``Conv1D``."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def new_linear(like: nn.Module, in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """Return an uninitialised ``nn.Linear`` on the device and of the dtype of ``like``."""
    weight = next(like.parameters())
    linear = nn.Linear(in_features, out_features, bias=bias, device="meta", dtype=weight.dtype)
    return linear.to_empty(device=weight.device)


@dataclass(frozen=True)
class _Entry:
    path: str
    blank: nn.Module
    stale: tuple[nn.Parameter, ...]
    heirs: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class _Attributes:
    path: str
    values: dict[str, Any]


@dataclass(frozen=True)
class _Undo:
    function: Callable[[nn.Module], object]


@dataclass(frozen=True)
class _Inheritance:
    stale: tuple[nn.Parameter, ...]
    heirs: tuple[nn.Parameter, ...]


class Ledger:
    """The replacements made in one model, in order.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> ledger = Ledger(model)
        >>> _ = ledger.replace("0", nn.Linear(2, 3))
        >>> ledger.revert()
        >>> model[0].out_features
        2
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._entries: list[_Entry | _Attributes | _Undo] = []
        self._inheritances: list[_Inheritance] = []

    def __len__(self) -> int:
        return len(self._entries)

    def replace(self, path: str, new: nn.Module) -> nn.Module:
        """Put ``new`` at ``path``, remember the original's shape (not its weights) and return the original.

        Hooks that follow the module move to ``new``, see :func:`carry_hooks`.
        """
        old = get_module(self.root, path)
        self._note(path, _blank(old), list(old.parameters()), list(new.parameters()))
        carry_hooks(old, new)
        return replace_module(self.root, path, new)

    def alter(
        self, path: str, change: Callable[[nn.Module], object], original: nn.Module | None = None
    ) -> None:
        """Change the parameters of the module at ``path`` in place, and remember its shape before.

        Args:
            path: Dotted path.
            change: Called with the module; gives it new parameters.
            original: What :meth:`revert` is to put there, on the meta device; a blank of the module by default.
        """
        module = get_module(self.root, path)
        blank, before = original or _blank(module), list(module.parameters())
        change(module)
        self._note(path, blank, before, list(module.parameters()))

    def set_attributes(self, path: str, **values: Any) -> None:
        """Set plain attributes of the module at ``path``, and remember what they were.

        Raises:
            AttributeError: If the module does not have one of them.
        """
        module = get_module(self.root, path)
        self._entries.append(_Attributes(path, {name: getattr(module, name) for name in values}))
        for name, value in values.items():
            setattr(module, name, value)

    def on_revert(self, undo: Callable[[nn.Module], object]) -> None:
        """Call ``undo(root)`` when :meth:`revert` comes to this point; a plain function, so that copies can be made."""
        self._entries.append(_Undo(undo))

    def _note(self, path: str, blank: nn.Module, before: list[Any], after: list[Any]) -> None:
        stale = tuple(p for p in before if id(p) not in set(map(id, after)))
        heirs = tuple(p for p in after if id(p) not in set(map(id, before)))
        self._entries.append(_Entry(path, blank, stale, heirs))

    def successors(self) -> dict[int, list[nn.Parameter]]:
        """Map the ``id`` of each parameter made stale to the live parameters that took its place, at last.

        The stale parameters are kept alive by the ledger until :meth:`forget_stale`, so the ids stay unique.
        A parameter that another module of the model still uses (tied weights) is not stale.
        """
        return successors_of([self])

    def replacements(self) -> Iterator[tuple[nn.Parameter, tuple[nn.Parameter, ...]]]:
        """Yield each parameter that something took the place of, and what did, in order."""
        noted = [entry for entry in self._entries if isinstance(entry, _Entry)]
        for entry in [*noted, *self._inheritances]:
            for parameter in entry.stale:
                yield parameter, entry.heirs

    def inherit(self, path: str, stale: Iterable[nn.Parameter]) -> None:
        """Note that the module now at ``path`` took the place of parameters, across a :meth:`revert`."""
        heirs = tuple(get_module(self.root, path).parameters())
        self._inheritances.append(_Inheritance(tuple(stale), heirs))

    def forget_stale(self) -> None:
        """Release the replaced parameters once every optimizer has been re-pointed."""
        self._entries = [
            replace(entry, stale=(), heirs=()) if isinstance(entry, _Entry) else entry
            for entry in self._entries
        ]
        self._inheritances = []

    def revert(self) -> None:
        """Put blank originals back, last replacement first; weights are zero until loaded."""
        while self._entries:
            entry = self._entries.pop()
            if isinstance(entry, _Undo):
                entry.function(self.root)
                continue
            module = get_module(self.root, entry.path)
            if isinstance(entry, _Attributes):
                for name, value in entry.values.items():
                    setattr(module, name, value)
                continue
            like = next(chain(module.parameters(), self.root.parameters()), torch.empty(()))
            original = _materialise(entry.blank, like)
            carry_hooks(module, original)
            replace_module(self.root, entry.path, original)


def successors_of(ledgers: Iterable[Ledger]) -> dict[int, list[nn.Parameter]]:
    """Map as :meth:`Ledger.successors` does, over several ledgers: heirs may have become stale in another one.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> first, second, weight = Ledger(model), Ledger(model), model[0].weight
        >>> _ = first.replace("0", nn.Linear(2, 3, bias=False)), second.replace("0", nn.Linear(2, 4, bias=False))
        >>> [tuple(heir.shape) for heir in successors_of([first, second])[id(weight)]]
        [(4, 2)]
    """
    ledgers = list(ledgers)
    live = {id(parameter) for ledger in ledgers for parameter in ledger.root.parameters()}
    heirs: dict[int, list[nn.Parameter]] = {}
    for stale, found in (pair for ledger in ledgers for pair in ledger.replacements()):
        heirs.setdefault(id(stale), []).extend(found)
    return {key: _last_heirs(key, heirs, live) for key in heirs if key not in live}


def _last_heirs(key: int, heirs: dict[int, list[nn.Parameter]], live: set[int]) -> list[nn.Parameter]:
    """Follow heirs that became stale themselves, each once."""
    seen, queue, last = {key}, list(heirs[key]), []
    while queue:
        heir = queue.pop(0)
        if id(heir) in seen:
            continue
        seen.add(id(heir))
        if id(heir) in live:
            last.append(heir)
        else:
            queue += heirs.get(id(heir), [])
    return last


def _blank(module: nn.Module) -> nn.Module:
    """Copy a module with its parameters moved to the meta device; no weight is copied, nor a hook that follows."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo | staying_hooks(module))


def _materialise(blank: nn.Module, like: torch.Tensor) -> nn.Module:
    """Give a blank module zero weights, on the device and of the dtype that the model has now."""
    for owner in blank.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.zeros_like(parameter, device=like.device, dtype=like.dtype)
                owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return blank
