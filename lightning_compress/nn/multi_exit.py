"""Exits: small heads after layers, each with weights of its own, that predict what the model's head predicts.

Heads sit at the model itself, as ``model.exits``, so that they are saved with it as ``exits.<layer>.*``. While training
they read the states that :class:`~lightning_compress.nn.layer_taps.LayerTaps` keeps. Who leaves by them is the next
chapter, :mod:`lightning_compress.nn.exit_router`.

Shape legend: B batch, T padded length, N packed rows, D hidden size, C classes, V vocabulary.

Paper: COST-EFF (arXiv 2210.15523), specification §1.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import Anatomy, describe
from lightning_compress.nn.dropping import real_tokens
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.surgery import get_module, linear_shape

__all__ = [
    "ExitHead",
    "Pooling",
    "SharedExits",
    "chosen_exits",
    "exit_logits",
    "exit_states",
    "has_exits",
    "install_exits",
    "remove_exits",
    "share_head",
    "shared_logits",
]

Pooling = Literal["cls", "mean"]
"""What a head reads: the first token of each text, or the mean over its tokens."""

_INIT_STD = 0.02


class ExitHead(nn.Module):
    """``Linear(Dropout(tanh(Dense(h))))`` over one state per text; the dense layer is optional.

    Args:
        hidden_size: Width D of the states.
        num_labels: Logits C.
        pooling: Which state of a text is read.
        pooler: Whether there is a dense layer, like BERT's pooler.
        dropout: Probability of the dropout before the linear, in [0, 1).

    Raises:
        ValueError: If the pooling is unknown or the dropout out of range.

    Paper: specification §1.2.
    Departs from the paper: the mean leaves padding out, which the official code averages in (§6-A, D12).

    Example:
        >>> head = ExitHead(4, 2).eval()
        >>> head(head.pool(torch.ones(3, 5, 4))).shape
        torch.Size([3, 2])
    """

    pooler: nn.Linear | None

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        *,
        pooling: Pooling = "mean",
        pooler: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r} is not one of {list(get_args(Pooling))}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} is outside [0, 1)")
        self.pooling = pooling
        self.register_module("pooler", nn.Linear(hidden_size, hidden_size) if pooler else None)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, num_labels)
        for linear in (self.pooler, self.classifier):
            if linear is not None:
                nn.init.normal_(linear.weight, std=_INIT_STD)
                nn.init.zeros_(linear.bias)

    def pool(self, hidden_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Return the state of each text that is read, ``[B, D]``.

        Args:
            hidden_BTD: States of a padded batch.
            real_BT: True for tokens, False for padding and for tokens that were dropped; None if all are there.
        """
        if self.pooling == "mean":
            wide_BTD = hidden_BTD.to(_wide(hidden_BTD.dtype))
            if real_BT is None:
                return wide_BTD.mean(dim=1).to(hidden_BTD.dtype)
            kept_BTD = wide_BTD.masked_fill(~real_BT.unsqueeze(-1), 0.0)
            return (kept_BTD.sum(dim=1) / real_BT.sum(dim=1, keepdim=True)).to(hidden_BTD.dtype)
        if real_BT is None:
            return hidden_BTD[:, 0]
        rows_B = torch.arange(len(real_BT), device=real_BT.device)
        return hidden_BTD[rows_B, real_BT.long().argmax(dim=1)]

    def pool_rows(self, hidden_ND: Tensor, segments: Segments) -> Tensor:
        """Return the same, of a packed batch."""
        if self.pooling == "cls":
            return hidden_ND[segments.firsts_B]
        wide_ND = hidden_ND.to(_wide(hidden_ND.dtype))
        zero_BD = wide_ND.new_zeros((segments.num_sequences, hidden_ND.shape[1]))
        sum_BD = zero_BD.index_add(0, segments.sequence_N, wide_ND)
        return (sum_BD / segments.lengths_B[:, None]).to(hidden_ND.dtype)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Return the logits ``[B, C]`` from what :meth:`pool` returns."""
        hidden_BD = pooled_BD if self.pooler is None else self.pooler(pooled_BD)
        return self.classifier(self.dropout(hidden_BD.tanh()))


class SharedExits(nn.Module):
    """Marks a decoder whose final norm and head are the exits of some layers too; has no weights.

    Args:
        layers: Layers that exit, from 0, ascending.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)


def chosen_exits(anatomy: Anatomy, exits: Iterable[int] | None) -> tuple[int, ...]:
    """Return the layers after which there is an exit of its own, ascending; all but the last if None.

    Raises:
        ValueError: If there is none, or one is no layer before the last.
    """
    last = len(anatomy.layers) - 1
    if last < 1:
        raise ValueError(
            "a model of one layer has no room for exits, which come before the last: leave MultiExit out"
        )
    chosen = tuple(range(last)) if exits is None else tuple(sorted({*exits}))
    if not chosen or chosen[0] < 0 or chosen[-1] >= last:
        raise ValueError(
            f"exits={exits if exits is None else list(chosen)} must name layers from 0 to {last - 1}, at least one: "
            "after the last layer comes the model's own head"
        )
    return chosen


def install_exits(
    model: nn.Module, layers: Sequence[int], *, pooling: Pooling, pooler: bool, dropout: float
) -> nn.ModuleDict:
    """Give a model exit heads, on its device and of its dtype, and return them by ``str(layer)``.

    With ``pooler`` each starts from a copy of the model's own pooler, where it has one of the same shape.

    Raises:
        ValueError: If the model has exits already, or an attribute of that name.
    """
    if getattr(model, "exits", None) is not None:
        raise ValueError("the model has exits already: it gets them once")
    anatomy, weight = describe(model), next(model.parameters())
    with torch.device(weight.device):
        heads = {
            str(layer): ExitHead(
                anatomy.hidden_size, _num_labels(model), pooling=pooling, pooler=pooler, dropout=dropout
            )
            for layer in layers
        }
    if pooler and anatomy.pooler is not None:
        for head in heads.values():
            _copy_pooler(get_module(model, anatomy.pooler), head)
    exits = nn.ModuleDict(heads).to(weight.dtype).train(model.training)
    model.add_module("exits", exits)
    return exits


def share_head(model: nn.Module, layers: Sequence[int]) -> SharedExits:
    """Let a decoder's final norm and head be the exits of some layers.

    Raises:
        ValueError: If the model has exits already, or no head on its tokens.
    """
    if getattr(model, "exits", None) is not None:
        raise ValueError("the model has exits already: it gets them once")
    anatomy = describe(model)
    if anatomy.head is None or anatomy.final_norm is None:
        raise ValueError(f"{type(model).__name__} has no final norm and head that exits could share")
    exits = SharedExits(layers)
    model.add_module("exits", exits)
    return exits


def remove_exits(model: nn.Module) -> None:
    """Take exits away again, with their rule and whoever leaves by them; a model without exits stays as it is."""
    for name in ("exits", "exit_rule"):
        model._modules.pop(name, None)
    taps = LayerTaps.on(model)
    if taps is not None:
        taps.equilibrium = None
        taps.memo.clear()
    router = vars(model).get("_exit_router")
    if router is not None:
        router.detach()


def has_exits(model: nn.Module) -> bool:
    """Whether a model has exits before its last layer."""
    return isinstance(getattr(model, "exits", None), nn.Module)


def exit_states(model: nn.Module) -> dict[int, Tensor]:
    """Return what each exit head reads of the latest pass, ``[B, D]`` by layer; of shared exits ``[B, T, D]``.

    Raises:
        LookupError: If the model has no exits, or did not run in training form since it got its taps.
    """
    if not has_exits(model):
        raise LookupError(f"{type(model).__name__} has no exits: prepare MultiExit first")
    taps = LayerTaps.of(model)
    layers = _layers_of(model)
    missing = [layer for layer in layers if layer not in taps.latest]
    if missing:
        raise LookupError(
            f"no states left layers {missing} in the latest pass: run the model first, and not packed, which calls no "
            "layer by itself (lightning_compress.unpack)"
        )
    if isinstance(model.exits, SharedExits):
        return {layer: taps.latest[layer] for layer in layers}
    return {layer: _pooled(model, taps, layer) for layer in layers}


def exit_logits(model: nn.Module) -> dict[int, Tensor]:
    """Return what each exit before the last says of the latest pass, ``[B, C]`` by layer, in ascending order.

    Asked again before the next pass, it returns the same tensors. Exits that share the head of a decoder return
    ``[B, T, V]``, computed anew at each call.

    Raises:
        LookupError: If the model has no exits, or did not run in training form since it got its taps.
    """
    states = exit_states(model)
    if isinstance(model.exits, SharedExits):
        return {layer: shared_logits(model, hidden_BTD) for layer, hidden_BTD in states.items()}
    known = LayerTaps.of(model).memo
    if "exit_logits" not in known:
        heads = cast(nn.ModuleDict, model.exits)
        known["exit_logits"] = {layer: heads[str(layer)](pooled_BD) for layer, pooled_BD in states.items()}
    return dict(known["exit_logits"])


def shared_logits(model: nn.Module, hidden_BTD: Tensor) -> Tensor:
    """Return what a decoder's final norm and head say of states between layers, ``[B, T, V]``."""
    anatomy = describe(model)
    assert anatomy.final_norm is not None and anatomy.head is not None, "checked when exits were shared"
    return get_module(model, anatomy.head)(get_module(model, anatomy.final_norm)(hidden_BTD))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What long sums are taken in: at least float32, for half precision loses tokens."""
    return torch.promote_types(dtype, torch.float32)


def _layers_of(model: nn.Module) -> tuple[int, ...]:
    exits = cast(SharedExits | nn.ModuleDict, model.exits)
    return exits.layers if isinstance(exits, SharedExits) else tuple(int(layer) for layer in exits)


def _pooled(model: nn.Module, taps: LayerTaps, layer: int) -> Tensor:
    head = cast(ExitHead, cast(nn.ModuleDict, model.exits)[str(layer)])
    mask, hidden_BTD = taps.masks.get(layer), taps.latest[layer]
    return head.pool(hidden_BTD, None if mask is None else real_tokens(mask, hidden_BTD))


def _num_labels(model: nn.Module) -> int:
    return int(model.config.num_labels)  # type: ignore[union-attr]


def _copy_pooler(source: nn.Module, head: ExitHead) -> None:
    dense = getattr(source, "dense", None)
    if head.pooler is None or dense is None or linear_shape(dense) != linear_shape(head.pooler):
        return
    with torch.no_grad():
        head.pooler.weight.copy_(dense.weight)
        head.pooler.bias.copy_(dense.bias)
