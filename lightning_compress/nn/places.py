"""Places in a model: modules by path, parameters by name, and hooks that stay in a place.

The next chapter is :mod:`lightning_compress.nn.surgery`, which changes what is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = [
    "carry_hooks",
    "get_module",
    "names_of",
    "remove_hook",
    "replace_module",
    "staying_hooks",
    "tie",
    "unwrap_adapter",
]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_HOOK_FLAGS = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


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


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the forward hooks and pre-hooks that belong to a place rather than to a module.

    They are those whose callable has a true attribute ``follows_module``, such as gates on a linear's input: they
    stay where they are while one module takes another's place. A handle from ``register_forward_hook`` cannot remove
    them afterwards; :func:`remove_hook` can.
    """
    for kind in _HOOKS:
        hooks = getattr(old, kind)
        for key in [key for key, hook in hooks.items() if _follows(hook)]:
            for table in (kind, *_HOOK_FLAGS[kind]):
                if key in getattr(old, table):
                    getattr(new, table)[key] = getattr(old, table).pop(key)


def staying_hooks(module: nn.Module) -> dict[int, Any]:
    """Return copies of the tables of hooks in ``module``, without those that follow, as a memo for deep copies."""
    tables = [getattr(part, kind) for part in module.modules() for kind in _HOOKS]
    return {
        id(table): OrderedDict((key, hook) for key, hook in table.items() if not _follows(hook))
        for table in tables
    }


def _follows(hook: object) -> bool:
    return bool(getattr(hook, "follows_module", False))


def remove_hook(root: nn.Module, hook: Callable[..., Any]) -> int:
    """Remove a forward hook or pre-hook from every module in ``root`` that has it; return from how many.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> def double(module, args):
        ...     return (2 * args[0],)
        >>> _ = model[0].register_forward_pre_hook(double)
        >>> remove_hook(model, double), remove_hook(model, double)
        (1, 0)
    """
    removed = 0
    for module in root.modules():
        for kind in _HOOKS:
            for key in [key for key, found in getattr(module, kind).items() if found is hook]:
                removed += 1
                for table in (kind, *_HOOK_FLAGS[kind]):
                    getattr(module, table).pop(key, None)
    return removed


def names_of(root: nn.Module, parameter: object) -> tuple[str, ...]:
    """Return the names under which a parameter is found in ``root``; more than one where weights are tied."""
    return tuple(name for name, p in root.named_parameters(remove_duplicate=False) if p is parameter)


def tie(root: nn.Module, names: Sequence[str]) -> None:
    """Make the parameters of these names one, the first.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> tie(model, ["0.weight", "1.weight"])
        >>> names_of(model, model[0].weight)
        ('0.weight', '1.weight')
    """
    shared = root.get_parameter(names[0])
    for name in names[1:]:
        owner, _, own = name.rpartition(".")
        setattr(get_module(root, owner), own, shared)


def unwrap_adapter(root: nn.Module, path: str) -> str:
    """Return the path of the linear itself where an adapter (peft LoRA) wraps it as ``base_layer``."""
    module = get_module(root, path)
    return f"{path}.base_layer" if isinstance(getattr(module, "base_layer", None), nn.Module) else path
