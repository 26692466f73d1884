"""One product for several quantised layers that read the same input: query, key and value.

The layers find each other by the engines that they were given; who runs them together asks :func:`joined_engine`, and
whoever runs one alone gets that one, which is built when it is first needed. The next chapter is
:mod:`lightning_compress.runtime.backends`.

Shape legend: N outputs of all layers together, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor, nn

from lightning_compress.runtime.fast_linear import Engine

__all__ = ["JoinedEngine", "PartEngine", "joined_engine"]


class JoinedEngine:
    """An engine for several layers at once.

    Args:
        engine: Computes all outputs ``[..., N]``.
        sizes: Outputs of each layer.

    Example:
        >>> both = JoinedEngine(lambda x: torch.cat([x, -x], dim=-1), sizes=(1, 1))
        >>> both(torch.tensor([[3.0]]))
        (tensor([[3.]]), tensor([[-3.]]))
    """

    def __init__(self, engine: Engine, sizes: Sequence[int]) -> None:
        self._engine, self._sizes = engine, tuple(sizes)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map ``[..., K]`` to the outputs of each layer."""
        return self._engine(x).split(self._sizes, dim=-1)


class PartEngine:
    """The engine of one layer among those that can run as one.

    Args:
        joined: The engine of all of them.
        place: Which of them this is.
        build: Makes this layer's own engine; called once at most. In most layers of a model it never is.
    """

    def __init__(self, joined: JoinedEngine, place: int, build: Callable[[], Engine]) -> None:
        self.joined, self.place, self._build = joined, place, build
        self._engine: Engine | None = None
        self._turn = Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to this layer's outputs."""
        engine = self._engine
        return engine(x) if engine is not None else self._first()(x)

    def _first(self) -> Engine:
        with self._turn:
            if self._engine is None:
                self._engine = self._build()
            return self._engine


def joined_engine(modules: Sequence[nn.Module]) -> JoinedEngine | None:
    """Return the engine that computes all these layers, in this order; None where they have to run on their own.

    That is where gradients are on, where a layer has hooks, and where they were not given one engine together.
    """
    if torch.is_grad_enabled():
        return None
    parts = [getattr(module, "engine", None) for module in modules]
    first = parts[0]
    if not isinstance(first, PartEngine):
        return None
    for place, (module, part) in enumerate(zip(modules, parts, strict=True)):
        is_part = isinstance(part, PartEngine) and part.joined is first.joined and part.place == place
        if not is_part or module._forward_hooks or module._forward_pre_hooks:
            return None
    return first.joined
