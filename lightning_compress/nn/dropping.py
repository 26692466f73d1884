"""Token dropping in training form: the family's own layers, with a bias per key in the place of a removal.

An encoder keeps its layers and gets a policy that decides, before each layer's attention, which tokens leave. Two
policies exist, :mod:`lightning_compress.nn.contribution_token_dropping` is the next chapter; both are run for real, on
rows that were moved together, by :mod:`lightning_compress.runtime`.

Shape legend: B batch, T padded length, N packed rows, D hidden size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from lightning_compress.nn.key_bias_attention import attention_with_key_bias
from lightning_compress.nn.segments import Segments

__all__ = ["DroppingEncoder", "InputRecorder", "KeepPolicy", "TrainingPolicy", "compute_dtype", "real_tokens"]

_SEEN = -1.0
"""Additive masks are 0 where a key is seen, and far below this where it is not."""


@runtime_checkable
class KeepPolicy(Protocol):
    """Decides over packed rows which tokens stay; an ``nn.Module``."""

    def protected(self, real_BT: Tensor) -> Tensor:
        """Return the tokens that never leave, bool ``[B, T]``; the first one of each sequence at least."""
        ...

    def decide(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        """Return the rows that enter the attention of ``layer``, bool ``[N]``; None if it does not decide."""
        ...


class TrainingPolicy(KeepPolicy, Protocol):
    """A policy whose decisions can be soft."""

    is_active: bool

    def begin(self, real_BT: Tensor) -> Any:
        """Return what is to be remembered from layer to layer, at the start of a pass."""
        ...

    def remove(self, layer: int, hidden_BTD: Tensor, state: Any) -> Tensor:
        """Update the state by the decision before ``layer``; return the bias of each key, float ``[B, T]``."""
        ...


class DroppingEncoder(nn.Module):
    """Takes the place of a family's encoder, keeps its layers under their names, and hides dropped tokens as keys.

    In evaluation the policy's decisions are hard, so that exactly the tokens that the packed engine would keep are
    seen. Tokens that left are still computed, but nobody looks at them: in evaluation they come out as zeros, as from
    the packed engine, for heads that read more than the first token.

    Args:
        encoder: The family's encoder, whose ``layer`` holds the layers.
        policy: Decides who stays; idle while ``policy.is_active`` is False.
    """

    def __init__(self, encoder: nn.Module, policy: nn.Module) -> None:
        super().__init__()
        self.layer = encoder.layer
        self.policy = policy
        self._family = (encoder,)  # in a tuple: not a sub-module

    @property
    def family(self) -> nn.Module:
        """The family's own encoder, around the same layers."""
        return self._family[0]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run all layers over ``[B, T, D]``.

        Raises:
            ValueError: If the mask cannot be read, or, on a CPU, a text is all padding while the policy is active.
        """
        extra = {name: value for name, value in kwargs.items() if value is not None and name != "use_cache"}
        policy: Any = self.policy
        state = real_BT = bias_BT = None
        if policy.is_active:
            real_BT = _with_a_token_each(real_tokens(attention_mask, hidden_states))
            state = policy.begin(real_BT)
        if self.training and dist.is_available() and dist.is_initialized():
            hidden_states = hidden_states + _zero(policy)
        with attention_with_key_bias(self._config(), hidden_states.shape[1], self._is_biased(state)):
            for index, layer in enumerate(self.layer):  # type: ignore[arg-type]
                mask = attention_mask
                if state is not None:
                    bias_BT = policy.remove(index, hidden_states, state)
                    mask = bias_BT[:, None, None, :].to(compute_dtype(hidden_states))
                out = layer(hidden_states, mask, **extra)
                hidden_states = out if isinstance(out, Tensor) else out[0]
        if real_BT is not None and bias_BT is not None and not self.training:
            hidden_states = hidden_states.masked_fill((real_BT & (bias_BT <= _SEEN)).unsqueeze(-1), 0.0)
        if real_BT is not None:
            hidden_states = _first_in_front(hidden_states, real_BT)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)

    def _config(self) -> Any:
        return next(module.config for module in self.layer.modules() if hasattr(module, "config"))  # type: ignore[union-attr]

    def _is_biased(self, state: Any) -> bool:
        """Whether biases get gradients, in this pass and not in a second one that checkpointing runs later."""
        is_checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self.layer)  # type: ignore[union-attr]
        return state is not None and self.training and not is_checkpointed


def _first_in_front(hidden_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """Let heads, which read place 0, find the first token there of texts that are padded on the left."""
    rows_B = torch.arange(len(real_BT), device=real_BT.device)
    first_B1D = hidden_BTD[rows_B, real_BT.long().argmax(dim=1)].unsqueeze(1)
    first_B1D = torch.where(real_BT[:, :1, None], hidden_BTD[:, :1], first_B1D)
    return torch.cat([first_B1D, hidden_BTD[:, 1:]], dim=1)


def _with_a_token_each(real_BT: Tensor) -> Tensor:
    """Refuse texts that are all padding where looking is free; elsewhere their first place counts as a token.

    A device would have to be waited for in every step. Without a token in each text nothing that is averaged over
    tokens would be a number, and with it the loss of the whole batch.
    """
    there_B1 = real_BT.any(dim=1, keepdim=True)
    if real_BT.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.cat([real_BT[:, :1] | ~there_B1, real_BT[:, 1:]], dim=1)
    if not bool(there_B1.all()):
        empty = (~there_B1).flatten().nonzero().flatten().tolist()
        raise ValueError(f"rows {empty} of the batch hold no token, only padding: leave them out")
    return real_BT


def _zero(policy: nn.Module) -> Tensor:
    """Return 0 as a function of every trainable parameter: processes wait for gradients of idle ones too."""
    return torch.stack([0.0 * p.sum() for p in policy.parameters() if p.requires_grad]).sum()


def real_tokens(attention_mask: Tensor | None, hidden_BTD: Tensor) -> Tensor:
    """Return which tokens are not padding, bool ``[B, T]``.

    Args:
        attention_mask: What transformers hands to an encoder: None, the user's ``[B, T]``, or ``[B, 1, T, T]``, bool or
            additive, in which all queries see the same keys.
        hidden_BTD: The embeddings.

    Raises:
        ValueError: If the mask has another form.

    Example:
        >>> real_tokens(torch.tensor([[1, 1, 0]]), torch.zeros(1, 3, 8))
        tensor([[ True,  True, False]])
    """
    if attention_mask is None:
        return torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        shape = getattr(attention_mask, "shape", None)
        raise ValueError(
            f"an attention mask of type {type(attention_mask).__name__} and shape {shape} cannot be read: load the "
            "model with attn_implementation='sdpa' or 'eager'"
        )
    keys_BT = attention_mask if attention_mask.dim() == 2 else attention_mask[:, 0, 0]
    if keys_BT.is_floating_point() and attention_mask.dim() == 4:
        return keys_BT > _SEEN
    return keys_BT.bool()


class InputRecorder:
    """Remembers the keyword arguments of a model's latest forward pass; copies of the model remember their own.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> recorder = InputRecorder().attach(model)
        >>> _ = model(torch.zeros(1, 2))
        >>> list(recorder.inputs)
        ['input']
        >>> recorder.detach()
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self._handle: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> InputRecorder:
        """Remember the arguments whenever ``model`` starts its ``forward``; returns the recorder."""
        self._handle = model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        return self

    def detach(self) -> None:
        """Stop, and forget."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self.inputs = None, {}

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [name for name in inspect.signature(module.forward).parameters if name != "kwargs"]
        self.inputs = {**dict(zip(names, args, strict=False)), **kwargs}

    def __getstate__(self) -> dict[str, Any]:
        return {"inputs": {}, "_handle": self._handle}

    def __deepcopy__(self, memo: dict[int, Any]) -> InputRecorder:
        twin = InputRecorder()
        memo[id(self)] = twin
        hooks = self._handle.hooks_dict_ref() if self._handle is not None else None
        if hooks is not None and id(hooks) in memo:
            twin._handle = copy.deepcopy(self._handle, memo)
        return twin


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which attention over ``hidden`` runs: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
