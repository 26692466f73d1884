"""Finding the transformers model inside whatever holds it.

A ``LightningModule`` with the model as an attribute, ``torch.compile``'s ``OptimizedModule`` and peft's
``PeftModel`` all register the model as a sub-module, so one walk over the module tree serves them all. The
next chapter is :mod:`lightning_compress.nn.surgery`.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

__all__ = ["find_transformer"]


def find_transformer(root: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """Return the outermost transformers model inside ``root`` and its dotted path from ``root``.

    Wrappers are looked through and stay part of the path (``"model._orig_mod"`` for a compiled model,
    ``"model.base_model.model"`` for a peft one), so ``root.get_submodule(path)`` is the model returned. A
    model nested in another one, or reachable under a second name, is not counted apart.

    Args:
        root: Any module; may itself be the transformers model, whose path is then ``""``.
        path: Where to look, e.g. ``"student"``; None searches all of ``root``. This is the ``module=``
            argument of the callbacks.

    Raises:
        ValueError: If ``root`` has no module at ``path``, or not exactly one transformers model is there.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
        >>> holder = nn.ModuleDict({"model": BertModel(config)})
        >>> find_transformer(holder)[0]
        'model'
    """
    prefix = path or ""
    try:
        start = root.get_submodule(prefix)
    except AttributeError as error:
        names = ", ".join(name for name, _ in root.named_children()) or "none"
        raise ValueError(
            f"module={path!r}: no such sub-module in {type(root).__name__} ({error}); its children: {names}"
        ) from error
    found = _outermost(start, prefix)
    where = f"{type(root).__name__}" + (f" at module={path!r}" if prefix else "")
    if not found:
        names = (
            ", ".join(f"{name} ({type(child).__name__})" for name, child in start.named_children()) or "none"
        )
        raise ValueError(
            f"no transformers model (a PreTrainedModel) found in {where}, whose children are: {names}; "
            "make the model an attribute of the module, or name its path with the callback's module= argument"
        )
    if len(found) > 1:
        names = ", ".join(f"{name!r} ({type(model).__name__})" for name, model in found)
        raise ValueError(
            f"{len(found)} transformers models found in {where}: {names}; "
            "choose one with the callback's module= argument"
        )
    return found[0]


def _outermost(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Return the transformers models beneath ``module`` that no other one contains, with their paths."""
    models = [
        (name, child)
        for name, child in module.named_modules(prefix=prefix)
        if isinstance(child, PreTrainedModel)
    ]
    inner = {id(part) for _, model in models for part in model.modules() if part is not model}
    return [(name, model) for name, model in models if id(model) not in inner]
