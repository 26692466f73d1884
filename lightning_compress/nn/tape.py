"""How layers talk to losses: small frozen records, written during ``forward`` and read after it.

A layer keeps the tape as a plain attribute and writes to it; a loss reads by record type. The model's outputs
and its configuration stay as they were. The next chapter is :mod:`lightning_compress.losses`.

Shape legend: B batch, T tokens, C classes, D hidden size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["ExitLogits", "HiddenStates", "Tape", "TokensKept"]

_Record = TypeVar("_Record")


@dataclass(frozen=True, eq=False)
class TokensKept:
    """Which tokens go on after a layer."""

    layer: int
    """Index of the layer, from 0."""
    keep_BT: Tensor
    """1 (or True) for tokens that stay, 0 for those that leave and for padding; soft while training."""


@dataclass(frozen=True, eq=False)
class ExitLogits:
    """What the exit after a layer predicts."""

    layer: int
    """Index of the layer, from 0."""
    logits_BC: Tensor
    """Unnormalised scores."""


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What a layer puts out."""

    layer: int
    """Index of the layer, from 0; -1 for the embeddings."""
    hidden_BTD: Tensor
    """The residual stream."""


class Tape:
    """The records of one model's latest forward pass.

    Attached to a model, it is cleared when the model's ``forward`` starts, so that gradient checkpointing,
    which runs layers again during ``backward``, cannot mix two passes: read before ``backward``. A deep or
    pickled copy of the model has an attached tape of its own, empty, which the copied layers write to.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> tape = Tape().attach(model)
        >>> tape.write(ExitLogits(layer=0, logits_BC=torch.zeros(1, 2)))
        >>> [record.layer for record in tape.read(ExitLogits)]
        [0]
        >>> tape.detach()
    """

    def __init__(self) -> None:
        self._records: dict[type, list[Any]] = {}
        self._handle: RemovableHandle | None = None

    @property
    def is_attached(self) -> bool:
        """Whether a model clears this tape."""
        return self._handle is not None

    def attach(self, root: nn.Module) -> Tape:
        """Clear the tape whenever ``root`` starts its ``forward``, before its other hooks; returns the tape.

        Raises:
            ValueError: If the tape is attached already.
        """
        if self._handle is not None:
            raise ValueError(
                "this tape is attached to a model already: call detach() first, or make one per model"
            )
        self._handle = root.register_forward_pre_hook(self._on_forward, prepend=True)
        return self

    def detach(self) -> None:
        """Remove the hook from the model, if there is one, and forget all records."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self.clear()

    def clear(self) -> None:
        """Forget all records."""
        self._records.clear()

    def write(self, record: object) -> None:
        """Append a record.

        Raises:
            TypeError: If it is not an instance of a frozen dataclass.
        """
        kind = type(record)
        if not is_dataclass(kind) or not getattr(kind, "__dataclass_params__").frozen:  # noqa: B009
            raise TypeError(f"a record is an instance of a frozen dataclass, got {kind.__name__}")
        self._records.setdefault(kind, []).append(record)

    def read(self, kind: type[_Record]) -> list[_Record]:
        """Return the records of exactly this type, in the order in which they were written.

        Raises:
            LookupError: If no layer wrote one since the model's ``forward`` last started.
        """
        if kind not in self._records:
            written = ", ".join(sorted(written.__name__ for written in self._records)) or "nothing"
            raise LookupError(
                f"no layer wrote {kind.__name__} in the latest forward pass (written: {written}); "
                "is the method that writes it prepared, and has the model run?"
            )
        return list(self._records[kind])

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module, args
        self.clear()

    def __getstate__(self) -> dict[str, Any]:
        # Records hold graph tensors, which can be neither copied nor pickled.
        return {"_records": {}, "_handle": self._handle}

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        twin = Tape()
        memo[id(self)] = twin
        # Attached only if the model is being copied as well: the copy of a lone layer must not pull it in.
        hooks = self._handle.hooks_dict_ref() if self._handle is not None else None
        if hooks is not None and id(hooks) in memo:
            twin._handle = copy.deepcopy(self._handle, memo)
        return twin
