"""Layer taps: the hidden states that leave each layer, read off any model by hooks, and balanced gradients.

Exits and hidden-state losses read what :class:`LayerTaps` keeps of the latest forward pass; no output, configuration or
class of the model changes. The next chapter is :mod:`lightning_compress.nn.multi_exit`.

Shape legend: B batch, T padded length, D hidden size.

Paper: COST-EFF (arXiv 2210.15523), gradient equilibrium as in specification §3.1.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.surgery import get_module

__all__ = ["EMBEDDINGS", "LayerTaps", "exits_above", "scale_gradient"]

EMBEDDINGS = -1
"""Under this number the states are found that enter the first layer."""

_NAME = "_layer_taps"


class _ScaledGradient(torch.autograd.Function):
    """The identity forward; backward the gradient times a number."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.factor, None


def scale_gradient(states: Tensor, factor: float) -> Tensor:
    """Return ``states`` themselves in value; the gradient that comes back through it is multiplied by ``factor``.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> scale_gradient(3 * x, 0.5).sum().backward()
        >>> x.grad
        tensor([1.5000, 1.5000])
    """
    return _ScaledGradient.apply(states, factor) if factor != 1.0 else states  # type: ignore[return-value]


def exits_above(exits: Iterable[int], num_layers: int) -> dict[int, int]:
    """Return for each layer the number of exits at or above it, the model's own head included.

    Args:
        exits: Layers with an exit of their own; that the last layer has one goes without saying.
        num_layers: Number of layers.

    Raises:
        ValueError: If an exit is at a layer that does not exist.

    Example:
        >>> exits_above([0, 2], num_layers=4)
        {0: 3, 1: 2, 2: 2, 3: 1}
    """
    places = {*exits, num_layers - 1}
    if min(places) < 0 or max(places) >= num_layers:
        raise ValueError(f"exits={sorted(places)} must be layers from 0 to {num_layers - 1}")
    return {layer: sum(place >= layer for place in places) for layer in range(num_layers)}


class LayerTaps:
    """Keeps the hidden states of a model's latest forward pass, one for each layer; made by :meth:`of`.

    Gradient checkpointing, which runs layers again, changes nothing; its reentrant variant hides states from losses and
    is refused. A deep copy of the model has taps of its own, empty.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        ...                     intermediate_size=16)
        >>> model = BertModel(config)
        >>> taps = LayerTaps.of(model)
        >>> _ = model(torch.ones(1, 3, dtype=torch.long))
        >>> {layer: list(hidden_BTD.shape) for layer, hidden_BTD in taps.latest.items()}
        {-1: [1, 3, 8], 0: [1, 3, 8], 1: [1, 3, 8]}
        >>> taps.detach()
    """

    latest: dict[int, Tensor]
    """States ``[B, T, D]`` that left each layer in the latest pass, by its index from 0, and under
    :data:`EMBEDDINGS` those that entered the first. With gradients: read before the next pass."""
    masks: dict[int, Tensor | None]
    """The attention mask that each layer got, in the form that the family hands to its layers."""
    inputs: dict[str, Any]
    """Arguments of the latest ``forward`` of the model, by name."""
    equilibrium: dict[int, int] | None
    """For each layer the number of exits at or above it, see :func:`exits_above`: each layer then gets the mean of
    the gradients of these exits instead of their sum, and the embeddings the mean of all. What decides which tokens
    are dropped gets the sum, as exits do. None leaves gradients alone."""
    memo: dict[str, Any]
    """What readers computed from the latest pass and want to find again; emptied with it."""

    def __init__(self) -> None:
        self.latest, self.masks, self.inputs, self.memo = {}, {}, {}, {}
        self.equilibrium = None
        self._roots: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> LayerTaps:
        """Return the taps of a transformers model: those it has, or new ones.

        Raises:
            TypeError: If ``model`` is not a transformers ``PreTrainedModel``.
            UnknownFamilyError: If its family is not known.
        """
        return cls.on(model) or cls()._attach(model)

    @staticmethod
    def on(model: nn.Module) -> LayerTaps | None:
        """Return the taps that a model has; None if it has none, or lost their hooks."""
        taps = vars(model).get(_NAME)
        hooks = model._forward_pre_hooks.values()
        return taps if any(isinstance(hook, _PassHook) and hook.taps is taps for hook in hooks) else None

    def detach(self) -> None:
        """Remove all hooks from the model and forget what was kept; a second call changes nothing."""
        for root in self._roots:
            for module in root.modules():
                _remove_hooks(module, self)
            vars(root).pop(_NAME, None)
        self._roots = ()
        self.clear()

    def clear(self) -> None:
        """Forget the latest pass."""
        for kept in (self.latest, self.masks, self.inputs, self.memo):
            kept.clear()

    def _attach(self, model: nn.Module) -> LayerTaps:
        layers = [get_module(model, layer.path) for layer in describe(model).layers]
        model.register_forward_pre_hook(_PassHook(self), with_kwargs=True, prepend=True)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(_InputHook(self, index), with_kwargs=True)
            layer.register_forward_hook(_LayerHook(self, index), with_kwargs=True)
        vars(model)[_NAME] = self
        self._roots = (model,)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What was kept holds graph tensors, which can be neither copied nor pickled.
        return {**vars(self), "latest": {}, "masks": {}, "inputs": {}, "memo": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerTaps:
        twin = LayerTaps()
        memo[id(self)] = twin
        twin.equilibrium = None if self.equilibrium is None else dict(self.equilibrium)
        # Only if the model is being copied as well: the copy of a lone layer must not pull it in.
        twin._roots = tuple(copy.deepcopy(root, memo) for root in self._roots if id(root) in memo)
        return twin


class _Hook:
    follows_module = True

    def __init__(self, taps: LayerTaps) -> None:
        self.taps = taps


class _PassHook(_Hook):
    """Of the model: a new pass begins."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.taps.clear()
        names = [name for name in inspect.signature(module.forward).parameters if name != "kwargs"]
        self.taps.inputs.update({**dict(zip(names, args, strict=False)), **kwargs})


class _IndexedHook(_Hook):
    """Of one layer."""

    def __init__(self, taps: LayerTaps, index: int) -> None:
        super().__init__(taps)
        self.index = index


class _InputHook(_IndexedHook):
    """Of a layer: keeps what enters the first, and gives back to gradients the weight of the exits above.

    What a policy of token dropping decides before the layer reaches it in the mask, which is treated alike.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.index == 0:
            self._begin(args[0] if args else kwargs["hidden_states"])
        counts = self.taps.equilibrium
        if counts is None or not torch.is_grad_enabled():
            return None
        given = dict(enumerate(args)) | kwargs
        scaled = {
            key: scale_gradient(value, counts[self.index]) for key, value in self._chosen(given).items()
        }
        return tuple((given | scaled)[key] for key in range(len(args))), {
            key: (given | scaled)[key] for key in kwargs
        }

    def _begin(self, hidden_BTD: Tensor) -> None:
        before = self.taps.latest.get(EMBEDDINGS)
        if before is not None and before is not hidden_BTD:
            self.taps.clear()  # a pass of the base model alone
        self.taps.latest[EMBEDDINGS] = hidden_BTD

    def _chosen(self, given: dict[Any, Any]) -> dict[Any, Tensor]:
        """Return the states, but not those of the embeddings, and the mask, by place or name."""
        states = () if self.index == 0 else (0, "hidden_states")
        chosen = {key: given[key] for key in (*states, 1, "attention_mask") if key in given}
        return {
            key: value for key, value in chosen.items() if isinstance(value, Tensor) and value.requires_grad
        }


class _LayerHook(_IndexedHook):
    """Of a layer: keeps what leaves it, and shares gradients that will come back among the exits."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        taps, index = self.taps, self.index
        hidden_BTD = output if isinstance(output, Tensor) else output[0]
        _refuse_reentrant_checkpoints(module, taps.latest.get(EMBEDDINGS))
        counts = taps.equilibrium if torch.is_grad_enabled() else None
        if counts is not None:
            hidden_BTD = scale_gradient(hidden_BTD, 1.0 / counts[index])
        taps.latest.setdefault(index, hidden_BTD)
        taps.masks.setdefault(index, _mask(args, kwargs))
        if counts is None:
            return None
        return hidden_BTD if isinstance(output, Tensor) else (hidden_BTD, *output[1:])


def _mask(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = kwargs["attention_mask"] if "attention_mask" in kwargs else next(iter(args[1:2]), None)
    return mask if isinstance(mask, Tensor) else None


def _refuse_reentrant_checkpoints(layer: nn.Module, embeddings_BTD: Tensor | None) -> None:
    """Refuse to keep states that losses could not send gradients through.

    Raises:
        ValueError: If the layer runs without gradients now, to be run again with them in ``backward``.
    """
    if torch.is_grad_enabled() or embeddings_BTD is None or not embeddings_BTD.requires_grad:
        return
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        raise ValueError(
            "reentrant gradient checkpointing hides the states between layers from exits and hidden-state losses: "
            "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def _remove_hooks(module: nn.Module, taps: LayerTaps) -> None:
    for hooks, beside in (
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.taps is taps]:
            del hooks[key]
            for extra in beside:
                extra.pop(key, None)
