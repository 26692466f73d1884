"""Slices of linears: keep some inputs and outputs of a layer, whatever form it is in.

A slice gives the module new, smaller parameters and leaves the module itself, its hooks and its place alone. The
next chapter is :mod:`lightning_compress.nn.layer_slices`, which knows what is sliced together.

Shape legend: I in features, O out features, K kept ones, M directions of a factorised layer, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.adapters import check_foldable
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from lightning_compress.nn.surgery import Ledger, get_module, is_linear

__all__ = ["check_sliceable", "keep_rows", "slice_at", "slice_linear"]

Indices = Sequence[int] | Tensor


def slice_linear(module: nn.Module, inputs: Indices | None = None, outputs: Indices | None = None) -> None:
    """Keep these inputs and outputs of a linear layer, in place; the kept weights stay as they are.

    Args:
        module: ``nn.Linear``, GPT-2's transposed ``Conv1D``, a
            :class:`~lightning_compress.nn.soft_threshold_rank.SoftThresholdLinear` (its factors lose columns and rows)
            or a :class:`~lightning_compress.nn.soft_threshold_rank.LowRankLinear`.
        inputs: Which inputs to keep, in this order; None keeps all.
        outputs: Which outputs to keep, in this order; None keeps all.

    Raises:
        TypeError: If the module is no such layer.

    Example:
        >>> linear = nn.Linear(3, 4)
        >>> slice_linear(linear, inputs=[0, 2], outputs=[1])
        >>> linear
        Linear(in_features=2, out_features=1, bias=True)
    """
    if isinstance(module, SoftThresholdLinear):
        module.keep_features(inputs, outputs)
    elif isinstance(module, LowRankLinear):
        slice_linear(module.down, inputs=inputs)
        slice_linear(module.up, outputs=outputs)
        module.in_features, module.out_features = module.down.in_features, module.up.out_features
    elif is_linear(module):
        _slice_dense(module, inputs, outputs)
    else:
        raise _no_linear(module)


def check_sliceable(root: nn.Module, path: str) -> None:
    """Refuse what :func:`slice_at` cannot slice.

    Raises:
        TypeError: If what sits at ``path``, or what an adapter there is around, is no linear layer.
        ValueError: If there is an adapter that is more than plain LoRA.
    """
    for inner, _, _ in _parts(root, path):
        module = get_module(root, inner)
        if not is_linear(module) and not isinstance(module, SoftThresholdLinear | LowRankLinear):
            raise _no_linear(module, f" at {inner}")


def slice_at(
    ledger: Ledger, path: str, inputs: Indices | None = None, outputs: Indices | None = None
) -> None:
    """Slice the linear at ``path`` and the LoRA adapters around it, and note it in the ledger.

    Raises:
        TypeError: If what sits there cannot be sliced.
        ValueError: If an adapter around it is more than plain LoRA.
    """
    for inner, takes_inputs, gives_outputs in _parts(ledger.root, path):
        kept_inputs, kept_outputs = inputs if takes_inputs else None, outputs if gives_outputs else None
        module = get_module(ledger.root, inner)
        original = module.dense_blank() if isinstance(module, SoftThresholdLinear) else None
        ledger.alter(
            inner, lambda part, i=kept_inputs, o=kept_outputs: slice_linear(part, i, o), original=original
        )
    wrapper = get_module(ledger.root, path)
    if hasattr(wrapper, "base_layer"):
        sizes = {"in_features": inputs, "out_features": outputs}
        ledger.set_attributes(path, **{name: len(kept) for name, kept in sizes.items() if kept is not None})


def keep_rows(parameter: nn.Parameter, kept: Indices, dim: int = 0) -> nn.Parameter:
    """Return a new parameter that holds some entries along ``dim``, in the order given."""
    index_K = torch.as_tensor(kept, dtype=torch.int64, device=parameter.device)
    return nn.Parameter(parameter.detach().index_select(dim, index_K), requires_grad=parameter.requires_grad)


def _no_linear(module: nn.Module, where: str = "") -> TypeError:
    return TypeError(
        f"{type(module).__name__}{where} is no linear layer that can be sliced: it must be nn.Linear, Conv1D or one of "
        "this library's low-rank forms. Load the model without quantisation"
    )


def _slice_dense(module: nn.Module, inputs: Indices | None, outputs: Indices | None) -> None:
    is_transposed = isinstance(module, Conv1D)
    names = ("nx", "nf") if is_transposed else ("in_features", "out_features")
    for name, kept, dim in zip(names, (inputs, outputs), (0, 1) if is_transposed else (1, 0), strict=True):
        if kept is not None:
            module.weight = keep_rows(module.weight, kept, dim)  # type: ignore[arg-type]
            setattr(module, name, len(kept))
    if outputs is not None and module.bias is not None:
        module.bias = keep_rows(module.bias, outputs)  # type: ignore[arg-type]


def _parts(root: nn.Module, path: str) -> Iterator[tuple[str, bool, bool]]:
    """Yield the path of each linear at ``path``, and whether it reads the layer's inputs and gives its outputs."""
    wrapper: Any = get_module(root, path)
    if isinstance(
        getattr(wrapper, "original_module", None), nn.Module
    ):  # peft's copies that are trained whole
        yield f"{path}.original_module", True, True
        for name in wrapper.modules_to_save:
            yield f"{path}.modules_to_save.{name}", True, True
        return
    if not isinstance(getattr(wrapper, "base_layer", None), nn.Module):
        yield path, True, True
        return
    check_foldable(f"{path}.base_layer", wrapper)
    yield f"{path}.base_layer", True, True
    for name in wrapper.lora_A:
        yield f"{path}.lora_A.{name}", True, False
        yield f"{path}.lora_B.{name}", False, True
