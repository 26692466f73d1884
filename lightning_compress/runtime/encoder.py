"""The packed encoder: unpads once, runs lean layers over rows, lets rows leave, and restores the user's order.

A token that is dropped is a row that leaves before a layer; an example that exits is all its rows leaving after one.

It takes the place of a family's encoder module and holds the same layers under the same names. Read
:mod:`lightning_compress.runtime.exits` for examples that leave, then :mod:`lightning_compress.runtime.packing`, which
puts the encoder there.

Shape legend: B sequences, T padded length, N rows, S sequences that stay, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from lightning_compress.nn.anatomy import Anatomy
from lightning_compress.nn.dropping import KeepPolicy, real_tokens
from lightning_compress.nn.exit_policy import ExitPolicy
from lightning_compress.nn.row_buckets import bucket_of, with_spare_rows
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.surgery import get_module
from lightning_compress.ops.compact import compact
from lightning_compress.runtime.block import LeanLayer
from lightning_compress.runtime.exits import Departed

__all__ = ["PackedEncoder"]


class PackedEncoder(nn.Module):
    """Runs a family's layers over packed rows ``[N, D]``; padding is never computed.

    Args:
        model: The model whose encoder this is to replace; not kept.
        anatomy: Its anatomy.
    """

    layer: nn.ModuleList
    """The family's own layers."""
    policy: nn.Module | None
    """A :class:`~lightning_compress.nn.dropping.KeepPolicy` that decides which rows leave; None drops nothing."""
    exits: ExitPolicy | None
    """Lets examples leave after layers, in evaluation; None lets nobody. Not a module: its heads are the model's."""
    first_only: bool
    """Whether only the first (classification) token is read of what comes out, so that only it is computed in the
    last layer and ``last_hidden_state`` is ``[B, 1, D]``."""
    states: torch.dtype | None
    """Dtype between the operators where gradients are off, in layers whose linears take any; None for that of the
    embeddings. Like the engines of such linears it is neither copied nor saved, and moves, casts and loads end it."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__()
        assert anatomy.encoder is not None
        family = get_module(model, anatomy.encoder)
        self.layer = cast(nn.ModuleList, family.layer)
        self.register_module("policy", None)
        self.exits = None
        self.states = None
        self.first_only = reads_first_token(model, anatomy)
        self.config = model.config
        self._trail: tuple[Segments, ...] = ()
        self._family = (family,)  # in a tuple: not a sub-module
        self._anatomies = anatomy.layers
        self._lean: list[LeanLayer] = []
        self.training = family.training

    @property
    def family(self) -> nn.Module:
        """The family's own encoder, around the same layers."""
        family = self._family[0]
        family.training = self.training
        return family

    @property
    def latest(self) -> tuple[Segments, ...]:
        """What entered each layer's attention in the latest forward pass; no rows of examples that had left."""
        num_examples = self._trail[0].num_sequences if self._trail else 0
        return tuple(segments.of_batch(num_examples) for segments in self._trail)

    @torch.compiler.disable  # shapes depend on values: tracing would break at every step, and gain nothing
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the states after the last layer.

        Args:
            hidden_states: Embeddings ``[B, T, D]``.
            attention_mask: What transformers makes of the user's mask: None, ``[B, T]`` or ``[B, 1, T, T]``.
            **kwargs: What transformers hands to encoders; what it asks for must not be lost.

        Returns:
            ``last_hidden_state`` of shape ``[B, T, D]``, with zeros in the places of padding and of dropped tokens;
            or ``[B, 1, D]``, the first token of each sequence, if :attr:`first_only`.

        Raises:
            ValueError: If hidden states of all layers, attention weights or cross-attention are asked for, or the
                mask cannot be read.
        """
        _refuse(self.config, kwargs)
        own = None if self.states is None or torch.is_grad_enabled() else hidden_states.dtype
        hidden_states = _as(self.states if own else None, hidden_states)
        hidden_ND, segments = self._unpad(hidden_states, attention_mask)
        trail: list[Segments] = []
        gone = Departed(self.first_only)
        policy = cast(KeepPolicy | None, self.policy)
        exits = None if self.training or self.exits is None else self.exits
        if exits is not None:
            exits.start(segments)
        lean = self._blocks()
        for index, block in enumerate(lean):
            is_last = index == len(lean) - 1
            if policy is not None and segments.num_rows:
                keep_N = policy.decide(index, _as(own, hidden_ND[: segments.num_rows]), segments)
                hidden_ND, segments = _drop(hidden_ND, segments, keep_N)
            trail.append(segments)
            if gone.are_all(segments):
                continue
            queries_B = segments.firsts_B if self.first_only and is_last else None
            hidden_ND = _run(block, hidden_ND, segments, queries_B)
            if exits is not None and not is_last and segments.num_sequences:
                stay_B = exits.check(index, _as(own, hidden_ND[: segments.num_rows]), segments)
                hidden_ND, segments = gone.let_leave(hidden_ND, segments, stay_B)
        self._trail = tuple(trail)
        output = _as(own, gone.put_back(hidden_ND, segments, hidden_states.shape))
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=cast(Any, output))

    def _unpad(self, hidden_BTD: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Segments]:
        _refuse_unequal_rows(attention_mask)
        real_BT = real_tokens(attention_mask, hidden_BTD)
        protected_BT = None if self.policy is None else cast(KeepPolicy, self.policy).protected(real_BT)
        segments = Segments.of(real_BT, protected_BT)
        rows = hidden_BTD.flatten(0, 1)
        if segments.num_rows == rows.shape[0]:
            return with_spare_rows(rows), segments
        spare = bucket_of(segments.num_rows, rows) - segments.num_rows
        return rows.index_select(0, F.pad(segments.origin_N, (0, spare))), segments

    def _blocks(self) -> list[LeanLayer]:
        """Return a lean block per layer, made anew where layers were removed or replaced."""
        layers = list(self.layer)
        if [id(block.layer) for block in self._lean] != [id(layer) for layer in layers]:
            self._lean = [
                LeanLayer(layer, anatomy) for layer, anatomy in zip(layers, self._anatomies, strict=False)
            ]
        return self._lean

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trail": (), "_lean": [], "states": None}

    def _replicate_for_data_parallel(self) -> PackedEncoder:
        replica: PackedEncoder = super()._replicate_for_data_parallel()  # type: ignore[assignment]
        replica.states = None
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEncoder:
        self.states = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.states = None
        super()._load_from_state_dict(*args, **kwargs)


def reads_first_token(model: PreTrainedModel, anatomy: Anatomy) -> bool:
    """Whether the task head reads the first token and nothing else, as transformers' own sequence classifiers do.

    A class with a ``forward`` of its own may read anything.
    """
    own = type(model).forward.__module__.startswith("transformers.models.")
    summary = (
        "sequence_summary" in anatomy.head_modules
        and getattr(model.config, "summary_type", "last") != "first"
    )
    return own and anatomy.head is not None and not anatomy.is_head_per_token and not summary


def _as(dtype: torch.dtype | None, states: Tensor) -> Tensor:
    """Cast states; None leaves them."""
    return states if dtype is None else states.to(dtype)


def _refuse(config: Any, asked: dict[str, Any]) -> None:
    for name in ("output_hidden_states", "output_attentions"):
        if asked.get(name, getattr(config, name, False)):
            raise ValueError(
                f"{name}={asked.get(name, True)!r}: a packed encoder keeps no such outputs; pass {name}=False, or run "
                "lightning_compress.unpack(model) first"
            )
    for name in ("encoder_hidden_states", "past_key_values"):
        if asked.get(name) is not None:
            raise ValueError(
                f"{name} is given, but packed encoders attend to their own sequence only: leave it out"
            )
    if asked.get("is_causal"):
        raise ValueError("is_causal=True: packed encoders attend in both directions; leave it out")


def _refuse_unequal_rows(mask: Tensor | None) -> None:
    """Refuse masks in which queries see different keys: padding is all that packing can express."""
    if mask is None or not isinstance(mask, Tensor) or mask.dim() != 4 or mask.stride(2) == 0:
        return
    if mask.shape[1] != 1 or not bool((mask == mask[:, :, :1]).all()):
        raise ValueError(
            f"the attention mask of shape {tuple(mask.shape)} differs from query to query or head to head: packed "
            "encoders know padding only; pass a mask of shape [batch, tokens], or unpack the model"
        )


def _drop(hidden_ND: Tensor, segments: Segments, keep_N: Tensor | None) -> tuple[Tensor, Segments]:
    """Move the rows that stay together, as soon as one leaves.

    Rows could also be left where they are and hidden as keys; that would spare the move, which is small beside a layer,
    and compute them for nothing.
    """
    if keep_N is None or bool(keep_N.all()):
        return hidden_ND, segments
    hidden_MD, cu_seqlens_B1, index_M = compact(
        hidden_ND[: segments.num_rows], keep_N, segments.cu_seqlens_B1
    )
    return with_spare_rows(hidden_MD), segments.select(index_M, cu_seqlens_B1)


def _run(block: LeanLayer, hidden_ND: Tensor, segments: Segments, queries_B: Tensor | None) -> Tensor:
    layer: Any = block.layer
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        run = partial(block, segments=segments, queries_B=queries_B)
        return layer._gradient_checkpointing_func(run, hidden_ND)
    return block(hidden_ND, segments, queries_B)
