"""Static token dropping: fixed numbers of tokens per layer in the place of thresholds, for ``torch.export`` and ONNX.

Shapes depend on the padded length alone, never on values; for the same reason all texts answer by one exit. What
``save_pretrained`` writes of a static model is the model it was made from: make it static where it is exported. The
next chapter is :mod:`lightning_compress.deploy.export`.

Shape legend: B sequences, T padded length, K tokens that stay, D hidden size, L layers, C classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from lightning_compress.nn.anatomy import LayerAnatomy, describe, find_transformer
from lightning_compress.nn.dropping import real_tokens
from lightning_compress.nn.exit_router import ExitRouter
from lightning_compress.nn.surgery import get_module, replace_module
from lightning_compress.runtime.block import LeanLayer
from lightning_compress.runtime.encoder import PackedEncoder
from lightning_compress.runtime.packing import pack, packed_encoder
from lightning_compress.runtime.static_exit import StaticExit
from lightning_compress.runtime.trial import Batch, dropping_encoder, inputs_of, kept_counts

__all__ = ["RankingPolicy", "StaticEncoder", "is_static", "make_static", "static_counts"]

Model = TypeVar("Model", bound=nn.Module)

_PROTECTED, _FIRST = 1e30, 2e30
"""Scores of tokens that leave last, and of the first token, which never leaves."""


class RankingPolicy(Protocol):
    """What a static encoder asks of a :class:`~lightning_compress.nn.dropping.KeepPolicy`."""

    def protected(self, real_BT: Tensor) -> Tensor:
        """Return the tokens that never leave, bool ``[B, T]``."""
        ...

    def scores(self, layer: int, hidden: Tensor) -> Tensor | None:
        """Return one score for each token of ``[..., D]``, of which the larger stay; None if it does not decide."""
        ...


class StaticEncoder(nn.Module):
    """Runs a family's layers over ``[B, K, D]``, where K is fixed for each layer.

    Padding is computed, and hidden as keys. Sequences start at the first place: padding is on the right.

    Args:
        encoder: The packed encoder to take layers and policy from.
        anatomies: Those of its layers.
        counts: Tokens that enter each layer's attention; None keeps all.
        answer: The exit that answers after the last of these layers; None leaves that to the model's head.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        anatomies: Sequence[LayerAnatomy],
        counts: tuple[int, ...] | None,
        answer: StaticExit | None = None,
    ) -> None:
        super().__init__()
        self.layer = encoder.layer[: len(anatomies)]
        self.register_module("policy", encoder.policy)
        self.counts = counts
        self.guard = _Guard()
        self.first_only = encoder.first_only if answer is None else answer.first_only
        self._answer = answer
        self._lean = [LeanLayer(*pair) for pair in zip(self.layer, anatomies, strict=True)]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Return the states after the last layer.

        Args:
            hidden_states: Embeddings ``[B, T, D]``.
            attention_mask: What transformers makes of the user's mask: None, ``[B, T]`` or ``[B, 1, T, T]``.
            **kwargs: What transformers hands to encoders; not needed here.

        Returns:
            ``last_hidden_state`` of shape ``[B, 1, D]`` if only the first token is read of it, else ``[B, K, D]``.
        """
        hidden_BKD, real_BK = hidden_states, real_tokens(attention_mask, hidden_states)
        policy = cast(RankingPolicy, self.policy)
        protected_BK = real_BK if self.counts is None else policy.protected(real_BK)
        if self.guard.guarded_BT is not None:
            protected_BK = protected_BK | self.guard.guarded_BT
        for index, block in enumerate(self._lean):
            score_BK = None
            if self.counts is not None and self.counts[index] < hidden_BKD.shape[1]:
                score_BK = policy.scores(index, hidden_BKD)
            if self.counts is not None and score_BK is not None:
                chosen_BK = _chosen(score_BK, real_BK, protected_BK, self.counts[index])
                hidden_BKD = _gather_rows(hidden_BKD, chosen_BK)
                real_BK, protected_BK = real_BK.gather(1, chosen_BK), protected_BK.gather(1, chosen_BK)
            is_last = index == len(self._lean) - 1
            hidden_BKD = block.padded(hidden_BKD, real_BK, first_only=self.first_only and is_last)
        if self._answer is not None:
            self._answer.give(hidden_BKD, real_BK)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=cast(Any, hidden_BKD))


class _Guard:
    """Where the hook that protects tokens for what they are notes them: not on a module, which tracing forbids."""

    guarded_BT: Tensor | None = None

    def take_over(self, embeddings: nn.Module, policy: nn.Module | None) -> None:
        """Let hooks that would tell the policy tell this instead."""
        for hook in embeddings._forward_pre_hooks.values():
            if policy is not None and getattr(hook, "policy", None) is policy:
                cast(Any, hook).policy = self
                cast(Any, policy).guarded_BT = None


def make_static(model: Model, counts: Sequence[int] | None = None, *, exit_layer: int | None = None) -> Model:
    """Return a copy of a model that keeps a fixed number of tokens at each layer, for export.

    Before each layer that decides, the ``counts`` tokens with the largest predicted shares stay, in their order; the
    classification token always, protected tokens before others, padding last. Thresholds and dial play no part: a
    long text may lose tokens that its thresholds would keep, and a short one keeps tokens that they would drop. With
    counts of at least the padded length this is the dense model. Exits are not asked who may leave: all texts run the
    same layers, to the end or up to the exit that is named.

    Args:
        model: A converted or loaded token-dropping model, a packed or a dense encoder, or a module that holds one. Its
            weights are copied; it stays as it is.
        counts: Tokens that enter each layer, see :func:`static_counts`; where the policy does not decide, none leave
            whatever the count. None keeps all.
        exit_layer: Layer, from 0, whose exit answers; layers after it are left out of the copy. None runs all layers.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: If counts are not one for each layer, fall below 1 or grow from layer to layer, there is no such
            exit, or the model is static already, cannot run packed, drops no tokens, or reads more than the first one.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=16)
        >>> static = make_static(BertForSequenceClassification(config))
        >>> program = torch.export.export(static, (torch.ones(2, 4, dtype=torch.long),))
    """
    if is_static(model):
        raise ValueError("the model is static already: make one from the model it was made from")
    static = pack(copy.deepcopy(model)).eval()
    transformer = cast(PreTrainedModel, find_transformer(static)[1])
    encoder, anatomy = packed_encoder(static), describe(transformer)
    assert encoder is not None and anatomy.encoder is not None, "pack puts it there"
    checked = None if counts is None else _checked(counts, encoder)
    answer = None if exit_layer is None else StaticExit.of(transformer, exit_layer)
    num_layers = len(anatomy.layers) if exit_layer is None else exit_layer + 1
    if not encoder.first_only and checked is not None:
        raise ValueError(
            f"{type(transformer).__name__} reads more than the first token of what comes out, so tokens cannot leave: "
            "make a model that classifies or scores a whole text static, or leave counts out"
        )
    fixed = StaticEncoder(encoder, anatomy.layers[:num_layers], checked, answer)
    replace_module(transformer, anatomy.encoder, fixed)
    router = ExitRouter.on(transformer)
    if router is not None:
        router.detach()
    if answer is not None:
        answer.attach(transformer)
    fixed.guard.take_over(get_module(transformer, anatomy.embeddings), encoder.policy)
    return static


def is_static(model: nn.Module) -> bool:
    """Whether the model was returned by :func:`make_static`."""
    return any(isinstance(module, StaticEncoder) for module in model.modules())


@torch.no_grad()
def static_counts(model: nn.Module, batches: Iterable[Batch], quantile: float = 0.95) -> tuple[int, ...]:
    """Return how many tokens to keep at each layer so that this share of the texts keeps no fewer than thresholds do.

    Args:
        model: A converted or loaded token-dropping model, or a module that holds one, with its dial set.
        batches: Keyword arguments of the model; other entries are left out.
        quantile: Share of texts, in (0, 1].

    Returns:
        A count per layer, not growing from layer to layer.

    Raises:
        ValueError: If the quantile is out of range, the model does not run packed or drops no tokens, or there is no
            data.
    """
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"quantile={quantile} is outside (0, 1]: 0.95 covers all but one text in twenty")
    encoder = dropping_encoder(model)
    transformer: Any = find_transformer(model)[1]
    was_training, exits = transformer.training, encoder.exits
    transformer.eval()
    kept, encoder.exits = [], None  # nobody will leave early
    try:
        for batch in batches:
            transformer(**inputs_of(transformer, batch))
            kept.append(kept_counts(encoder).cpu())
    finally:
        encoder.exits = exits
        transformer.train(was_training)
    if not kept:
        raise ValueError("there are no batches to count tokens in: give some, as a list or a data loader")
    sorted_BL = torch.cat(kept).sort(dim=0).values
    covered = math.ceil(round(quantile * len(sorted_BL), 6))
    return tuple(sorted_BL[covered - 1].tolist())


def _checked(counts: Sequence[int], encoder: PackedEncoder) -> tuple[int, ...]:
    counts = tuple(int(count) for count in counts)
    num_layers = len(encoder.layer)
    if len(counts) != num_layers or min(counts) < 1 or list(counts) != sorted(counts, reverse=True):
        raise ValueError(
            f"counts={counts} must be {num_layers} numbers of at least 1, one for each layer, none above the one "
            "before: tokens that left do not come back"
        )
    if encoder.policy is None:
        raise ValueError(
            f"counts={counts} need a policy that tells which tokens stay, and the model has none: train it with "
            "ContributionTokenDropping, or leave counts out"
        )
    return counts


def _chosen(score_BK: Tensor, real_BK: Tensor, protected_BK: Tensor, count: int) -> Tensor:
    """Return the places of the tokens that stay, ascending, ``[B, count]``."""
    score_BK = score_BK.float().masked_fill(protected_BK, _PROTECTED).masked_fill(~real_BK, -torch.inf)
    first_BK = torch.arange(score_BK.shape[1], device=score_BK.device) == 0
    return score_BK.masked_fill(first_BK, _FIRST).topk(count, dim=1).indices.sort(dim=1).values


def _gather_rows(hidden_BKD: Tensor, chosen_BK: Tensor) -> Tensor:
    return hidden_BKD.gather(1, chosen_BK.unsqueeze(-1).expand(-1, -1, hidden_BKD.shape[2]))
