"""Who leaves by which exit, and how all get their answer: the same decisions in training form and packed.

An :class:`ExitRouter` holds a model's exit heads and its rule. Packed, :mod:`lightning_compress.runtime.encoder` asks
it after each layer who stays. In training form all layers run, and it is asked afterwards, with the states that each
layer put out. Either way a hook on the model's head puts the logits of those who left in their places, before the
family's own code computes a loss, and a hook on the model adds ``exit_depth`` to what it returns.

Shape legend: B examples, N rows, D hidden size, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.dropping import real_tokens
from lightning_compress.nn.exit_policy import ExitRule, PassMemory
from lightning_compress.nn.layer_taps import LayerTaps
from lightning_compress.nn.multi_exit import ExitHead
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.surgery import get_module, remove_hook

__all__ = ["ExitRouter"]

_NAME = "_exit_router"


class _RouterMemory(PassMemory):
    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.depth_B: Tensor | None = None
        self.left: list[tuple[Tensor, Tensor]] = []
        self.is_answered = False


class ExitRouter:
    """Lets examples leave by the exits of a model while it is in evaluation mode; an ``ExitPolicy``.

    Args:
        model: A model with ``exits`` and ``exit_rule``.

    Outputs get a field ``exit_depth``, integers ``[B]``: how many layers ran for each example; tuples
    (``return_dict=False``) stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        anatomy = describe(model)
        assert anatomy.head is not None, "only classifiers have exits"
        self._model = model
        self._num_layers = len(anatomy.layers)
        self._hooks: tuple[_Hook, ...] = (_Begin(self), _Merge(self), _Report(self))
        self._pass = _RouterMemory()
        begin, merge, report = self._hooks
        model.register_forward_pre_hook(begin, prepend=True)
        get_module(model, anatomy.head).register_forward_hook(merge)
        model.register_forward_hook(report)
        vars(model)[_NAME] = self

    @staticmethod
    def on(model: nn.Module) -> ExitRouter | None:
        """Return the router of a model; None if it has none."""
        return vars(model).get(_NAME)

    def detach(self) -> None:
        """Take the hooks off the model: nobody leaves any more."""
        for hook in self._hooks:
            remove_hook(self._model, hook)
        vars(self._model).pop(_NAME, None)
        self._pass.forget()

    @property
    def rule(self) -> ExitRule:
        """When examples leave."""
        return cast(ExitRule, self._model.exit_rule)

    @property
    def heads(self) -> nn.ModuleDict:
        """The exits by ``str(layer)``."""
        return cast(nn.ModuleDict, self._model.exits)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers after which there is an exit, ascending, from 0."""
        return tuple(int(layer) for layer in self.heads)

    def start(self, segments: Segments) -> None:
        """Forget the latest pass: one with these examples begins."""
        self._pass.forget()
        device = segments.origin_N.device
        self.rule.start(segments.num_sequences, device)
        self._pass.depth_B = torch.full((segments.num_sequences,), self._num_layers, device=device)

    def look(self, layer: int, hidden_ND: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Return the logits ``[B, C]`` of the exit after ``layer`` and the states ``[B, D]`` that it read."""
        head = cast(ExitHead, self.heads[str(layer)])
        pooled_BD = head.pool_rows(hidden_ND, segments)
        return head(pooled_BD), pooled_BD

    def check(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        """Return which examples stay, bool ``[B]``; None if all do. The logits of those that leave are remembered."""
        if layer not in self.layers or not self.rule.is_asked(layer):
            return None
        logits_BC, pooled_BD = self.look(layer, hidden_ND, segments)
        leaves_B = self.rule.leaves(layer, logits_BC, pooled_BD)
        left = leaves_B.nonzero().squeeze(1)
        if not len(left):
            return None
        examples = segments.examples_B[left]
        assert self._pass.depth_B is not None, "a pass was started"
        self._pass.depth_B[examples] = layer + 1
        self._pass.left.append((examples, logits_BC[left]))
        self.rule.keep(~leaves_B)
        return ~leaves_B

    def merge(self, logits_BC: Tensor) -> Tensor:
        """Return the logits of the model's head, with those of the exits in the places of examples that left."""
        if not self._pass.left:
            return logits_BC
        places = torch.cat([examples for examples, _ in self._pass.left])
        said = torch.cat([logits for _, logits in self._pass.left])
        return logits_BC.index_copy(0, places, said.to(logits_BC.dtype))

    def _replay(self, taps: LayerTaps) -> None:
        """Ask all exits in turn, with the states that all layers put out for all examples."""
        hidden_BTD = taps.latest[self._num_layers - 1]
        everyone_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
        self.start(Segments.of(everyone_BT))
        here = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
        for layer in self.layers:
            if not len(here) or not self.rule.is_asked(layer):
                continue
            segments, hidden_ND = _rows(taps, layer, here)
            stay_B = self.check(layer, hidden_ND, segments)
            here = here if stay_B is None else here[stay_B]


def _rows(taps: LayerTaps, layer: int, here: Tensor) -> tuple[Segments, Tensor]:
    """Return the tokens that a layer saw of some examples, as the packed engine would hand them over."""
    hidden_BTD = taps.latest[layer]
    real_BT = real_tokens(taps.masks.get(layer), hidden_BTD).expand(hidden_BTD.shape[:2])[here]
    segments = Segments.of(real_BT)
    hidden_ND = hidden_BTD[here].flatten(0, 1)[segments.origin_N]
    return Segments(segments.cu_seqlens_B1, segments.origin_N, example_B=here), hidden_ND


@torch.compiler.disable
def _begin(router: ExitRouter) -> None:
    router._pass.forget()


@torch.compiler.disable
def _answer(router: ExitRouter, logits_BC: Tensor) -> Tensor | None:
    """Return what the head says once those who left have their answers; None if nothing changes."""
    if router._model.training:
        return None
    taps = LayerTaps.on(router._model)
    if router._pass.depth_B is None and taps is not None and taps.latest:
        router._replay(taps)
    router._pass.is_answered = True
    return router.merge(logits_BC) if router._pass.left else None


@torch.compiler.disable
def _report(router: ExitRouter, output: Any) -> None:
    """Say how far each example came; where compiled code passed the head's hook by, put the answers in place.

    ``torch.compile`` shares code among models of one shape, and does not look whether they have hooks.

    Raises:
        RuntimeError: If a loss was computed before the answers were in place.
    """
    is_mapping = isinstance(output, MutableMapping)
    if router._pass.left and not router._pass.is_answered:
        if not is_mapping or output.get("loss") is not None:
            raise RuntimeError(
                "torch.compile ran code that it made for a model without exits, which leaves out what exits say: call "
                "torch.compiler.reset() before compiling this model"
            )
        output["logits"] = router.merge(output["logits"])
    if router._pass.depth_B is not None and is_mapping:
        output["exit_depth"] = router._pass.depth_B


class _Hook(ABC):
    """Belongs to a place in the model, whichever module is there."""

    follows_module = True

    def __init__(self, router: ExitRouter) -> None:
        self.router = router

    @abstractmethod
    def __call__(self, *args: Any) -> Any:
        """Run at that place."""


class _Begin(_Hook):
    """Before the model runs."""

    def __call__(self, *args: Any) -> None:
        _begin(self.router)  # type: ignore[call-arg]


class _Merge(_Hook):
    """After the head."""

    def __call__(self, *args: Any) -> Tensor | None:
        return _answer(self.router, args[-1])  # type: ignore[call-arg]


class _Report(_Hook):
    """After the model."""

    def __call__(self, *args: Any) -> None:
        _report(self.router, args[-1])  # type: ignore[call-arg]
