"""Adapters (LoRA as peft has it) around linears: what they add to the weight, to be folded into it.

An adapter is a module that holds the linear as ``base_layer`` and adds ``s B A x`` to what it computes. It is
recognised by these parts; peft is not imported. The next chapter is :mod:`lightning_compress.methods`.

Shape legend: I in features, O out features, R rank of all active adapters together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.surgery import Ledger, dense_weight, get_module, unwrap_adapter

__all__ = [
    "adapter_around",
    "adapter_factors",
    "adapter_rank",
    "check_foldable",
    "fold_adapter",
    "without_adapter",
]

_INNER = ".base_layer"


def adapter_around(root: nn.Module, path: str) -> Any | None:
    """Return the adapter whose own linear is at ``path`` (``"….query.base_layer"``), or None."""
    return get_module(root, without_adapter(path)) if path.endswith(_INNER) else None


def without_adapter(path: str) -> str:
    """Return the path that a linear has once its adapter is gone.

    Example:
        >>> without_adapter("layer.0.query.base_layer")
        'layer.0.query'
    """
    return path.removesuffix(_INNER)


def check_foldable(path: str, adapter: Any) -> None:
    """Refuse adapters that are more than a low-rank addition to the weight.

    Raises:
        ValueError: With the reason, if the adapter is not plain LoRA or is merged for the time being.
    """
    reason = None
    if not isinstance(getattr(adapter, "lora_A", None), nn.ModuleDict):
        reason = "is not LoRA"
    elif len(getattr(adapter, "lora_magnitude_vector", ())) or getattr(adapter, "lora_variant", None):
        reason = "is a variant of LoRA (such as DoRA) that is no plain product"
    elif any(getattr(adapter, "lora_bias", {}).values()):
        reason = "has a bias of its own (lora_bias=True)"
    elif getattr(adapter, "merged", False):
        reason = "is merged for the time being (call unmerge_adapter() first)"
    if reason:
        raise ValueError(
            f"the {type(adapter).__module__}.{type(adapter).__qualname__} around {without_adapter(path)} {reason}, so "
            "it cannot be folded into a compressed layer: use plain LoRA, exclude the layer, or call "
            "merge_and_unload() before compressing"
        )


def adapter_rank(adapter: Any | None) -> int:
    """Return the rank that folding the active adapters adds to the layer; 0 without an adapter."""
    active = [] if adapter is None else [adapter.lora_A[name] for name in _active(adapter)]
    return sum(lora_A.weight.shape[0] for lora_A in active)


def adapter_factors(adapter: Any | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``s B`` ``[O, R]`` and ``A`` ``[R, I]`` of the active adapters side by side.

    Args:
        adapter: The adapter, or None for factors of rank 0.
        like: The layer's weight ``[O, I]``, for shape, dtype and device.
    """
    outputs, inputs = like.shape
    ups, downs = [like.new_empty(outputs, 0)], [like.new_empty(0, inputs)]
    for name in [] if adapter is None else _active(adapter):
        ups.append((adapter.scaling[name] * adapter.lora_B[name].weight).to(like))  # type: ignore[union-attr]
        downs.append(adapter.lora_A[name].weight.to(like))  # type: ignore[union-attr]
    return torch.cat(ups, dim=1), torch.cat(downs, dim=0)


@torch.no_grad()
def fold_adapter(ledger: Ledger, path: str) -> bool:
    """Put a dense linear in the place of the adapter around it, with what the adapter adds to its weight.

    Args:
        ledger: Where the change is noted.
        path: Of the adapter.

    Returns:
        Whether there was one.

    Example:
        >>> fold_adapter(Ledger(nn.Sequential(nn.Linear(2, 2))), "0")
        False
    """
    inner = unwrap_adapter(ledger.root, path)
    if inner == path:
        return False
    linear = get_module(ledger.root, inner)
    weight_OI = dense_weight(linear)
    extra_OR, extra_RI = adapter_factors(get_module(ledger.root, path), weight_OI)
    weight_OI += extra_OR @ extra_RI
    ledger.replace(path, linear)
    return True


def _active(adapter: Any) -> list[str]:
    """Names of the adapters that take part in the output now."""
    is_idle = adapter.merged or adapter.disable_adapters
    return [] if is_idle else [name for name in adapter.active_adapters if name in adapter.lora_A]
