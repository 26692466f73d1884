"""Surgery: replace modules by path, and remember enough to undo it and to re-point optimizers.

Every structural change goes through a :class:`Ledger`. It knows which parameters a replacement made stale and
which ones took their place (for optimizers that were built too early), and it can put blank originals back
(for checkpoints that hold an earlier, larger structure).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = [
    "Ledger",
    "dense_weight",
    "get_module",
    "is_linear",
    "linear_shape",
    "new_linear",
    "replace_module",
    "unwrap_adapter",
]


def get_module(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path; the empty path is the root itself.

    Raises:
        ValueError: If there is no module at that path.
    """
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"no module at path {path!r} in {type(root).__name__}: {error}") from error


def replace_module(root: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Put ``new`` at a dotted path and return what was there; train/eval mode is carried over."""
    parent_path, _, name = path.rpartition(".")
    parent, old = get_module(root, parent_path), get_module(root, path)
    new.train(old.training)
    parent._modules[name] = new
    return old


def unwrap_adapter(root: nn.Module, path: str) -> str:
    """Return the path of the linear itself where an adapter (peft LoRA) wraps it as ``base_layer``."""
    module = get_module(root, path)
    return f"{path}.base_layer" if isinstance(getattr(module, "base_layer", None), nn.Module) else path


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
        self._entries: list[_Entry] = []
        self._inheritances: list[_Inheritance] = []

    def __len__(self) -> int:
        return len(self._entries)

    def replace(self, path: str, new: nn.Module) -> nn.Module:
        """Put ``new`` at ``path``, remember the original's shape (not its weights) and return the original."""
        old = get_module(self.root, path)
        before, after = list(old.parameters()), list(new.parameters())
        stale = tuple(p for p in before if id(p) not in set(map(id, after)))
        heirs = tuple(p for p in after if id(p) not in set(map(id, before)))
        self._entries.append(_Entry(path, _blank(old), stale, heirs))
        return replace_module(self.root, path, new)

    def successors(self) -> dict[int, list[nn.Parameter]]:
        """Map the ``id`` of each parameter made stale to the live parameters that took its place.

        The stale parameters are kept alive by the ledger until :meth:`forget_stale`, so the ids stay unique.
        A parameter that another module of the model still uses (tied weights) is not stale.
        """
        live = {id(parameter) for parameter in self.root.parameters()}
        found: dict[int, list[nn.Parameter]] = {}
        for entry in [*self._entries, *self._inheritances]:
            for parameter in entry.stale:
                if id(parameter) not in live:
                    found[id(parameter)] = [p for p in entry.heirs if id(p) in live]
        return found

    def inherit(self, path: str, stale: Iterable[nn.Parameter]) -> None:
        """Note that the module now at ``path`` took the place of parameters, across a :meth:`revert`."""
        heirs = tuple(get_module(self.root, path).parameters())
        self._inheritances.append(_Inheritance(tuple(stale), heirs))

    def forget_stale(self) -> None:
        """Release the replaced parameters once every optimizer has been re-pointed."""
        self._entries = [_Entry(entry.path, entry.blank, (), ()) for entry in self._entries]
        self._inheritances = []

    def revert(self) -> None:
        """Put blank originals back, last replacement first; weights are zero until loaded."""
        while self._entries:
            entry = self._entries.pop()
            like = next(get_module(self.root, entry.path).parameters(), torch.empty(()))
            replace_module(self.root, entry.path, _materialise(entry.blank, like))


def _blank(module: nn.Module) -> nn.Module:
    """Copy a module with its parameters moved to the meta device; no weight is copied."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _materialise(blank: nn.Module, like: torch.Tensor) -> nn.Module:
    """Give a blank module zero weights, on the device and of the dtype that the model has now."""
    for owner in blank.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                empty = torch.zeros_like(parameter, device=like.device, dtype=like.dtype)
                owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return blank
