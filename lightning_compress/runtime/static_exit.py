"""One exit for all texts: what a static model answers by when its later layers are left out.

:mod:`lightning_compress.runtime.static` puts it there.

Shape legend: B sequences, K tokens that stay, D hidden size, C classes.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.multi_exit import ExitHead
from lightning_compress.nn.surgery import get_module

__all__ = ["StaticExit"]


class StaticExit:
    """Answers in the place of the model's head, whose logits a hook replaces.

    Not a module, which tracing forbids to change in a pass; its head is one of the model's own.

    Args:
        head: The exit.

    Example:
        >>> import torch
        >>> answer = StaticExit(ExitHead(4, 2).eval())
        >>> answer.give(torch.ones(3, 1, 4), torch.ones(3, 1, dtype=torch.bool))
        >>> answer().shape
        torch.Size([3, 2])
    """

    def __init__(self, head: ExitHead) -> None:
        self.head = head
        self._logits_BC: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, layer: int) -> StaticExit:
        """Return the exit after a layer of a transformer, counted from 0.

        Raises:
            ValueError: If there is none.
        """
        heads = getattr(model, "exits", None)
        names = list(heads) if isinstance(heads, nn.ModuleDict) else []
        if not names:
            raise ValueError(
                f"exit {layer} is asked for, but the model has no exits: train it with MultiExit, or leave that out"
            )
        if str(layer) not in names:
            raise ValueError(
                f"exit {layer} is not after one of the layers {', '.join(names)}: name one of these, or none for the "
                "answer of the model's own head"
            )
        return cls(cast(ExitHead, cast(nn.ModuleDict, heads)[str(layer)]))

    @property
    def first_only(self) -> bool:
        """Whether it reads only the first token of each text."""
        return self.head.pooling == "cls"

    def attach(self, model: nn.Module) -> None:
        """Answer for the head of a transformer from now on."""
        head = describe(model).head
        assert head is not None, "only models with a head have exits"
        get_module(model, head).register_forward_hook(self)

    def give(self, hidden_BKD: Tensor, real_BK: Tensor) -> None:
        """Answer from the states after the last layer that runs.

        Args:
            hidden_BKD: The states; the first token's only, ``[B, 1, D]``, if nothing else is read.
            real_BK: True for tokens, False for padding.
        """
        pooled_BD = self.head.pool(hidden_BKD, None if self.first_only else real_BK)
        self._logits_BC = self.head(pooled_BD)

    def __call__(self, *args: Any) -> Tensor | None:
        """Return the answer ``[B, C]``, in the place of what the model's head put out."""
        logits_BC, self._logits_BC = self._logits_BC, None
        return logits_BC
