"""Attention as training sees it: by degrees in integers, whatever form the mask has.

Both transformers' attention modules and the packed engine find a :class:`RoundedAttention` where they will find a
:class:`~lightning_compress.nn.quantized_attention.BlockAttention` once the model is converted.

Shape legend: B batch, H heads, G key-value heads, Q queries, T keys, E head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_compress.nn.quantized_attention import IMPLEMENTATION, BlockAttention, block_attention_forward
from lightning_compress.nn.rounded_operators import Ramp
from lightning_compress.nn.surgery import Ledger, get_module

__all__ = ["TRAINING_IMPLEMENTATION", "RoundedAttention", "attend_in_training", "rounded_attention_forward"]

TRAINING_IMPLEMENTATION = "lightning_compress_rounded"
"""Name of this attention in transformers' registry, and in ``config._attn_implementation`` while training."""

_SEEN = -1.0
"""Additive masks are far below this where a key is not seen; between this and 0 it is disfavoured."""


class RoundedAttention:
    """How one layer attends while it learns to be quantised.

    Args:
        attention: How it will attend.
        ramp: How much of that is seen.
    """

    def __init__(self, attention: BlockAttention, ramp: Ramp) -> None:
        self.attention, self.ramp = attention, ramp

    def __call__(
        self,
        query_BHQE: Tensor,
        key_BGTE: Tensor,
        value_BGTE: Tensor,
        seen: Tensor | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as :class:`~lightning_compress.nn.quantized_attention.BlockAttention` does, by degrees.

        Returns:
            What was attended to ``[B, H, Q, E]``, and the weights ``[B, H, Q, T]`` where they are rounded in full.
        """
        held, weight = None, None
        if self.ramp.is_active:
            held, weight = self.attention(query_BHQE, key_BGTE, value_BGTE, seen, scale, dropout)
        if held is not None and self.ramp.is_full:
            return held, weight
        grouped = query_BHQE.shape[1] != key_BGTE.shape[1]
        exact_BHQE = F.scaled_dot_product_attention(
            query_BHQE, key_BGTE, value_BGTE, seen, dropout, scale=scale, enable_gqa=grouped
        )
        return exact_BHQE if held is None else self.ramp.blend(exact_BHQE, held), None


def attend_in_training(ledger: Ledger, paths: list[str], attention: RoundedAttention) -> None:
    """Let the attention modules at these paths attend so, until the ledger reverts it."""
    model: Any = ledger.root
    before = model.config._attn_implementation
    ledger.on_revert(partial(_set_implementation, paths=tuple(paths), name=before))
    _set_implementation(model, tuple(paths), TRAINING_IMPLEMENTATION)
    for path in paths:
        module: Any = get_module(model, path)
        module.block_attention = None
        ledger.set_attributes(path, block_attention=attention)


def rounded_attention_forward(
    module: nn.Module,
    query_BHQE: Tensor,
    key_BGTE: Tensor,
    value_BGTE: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the module's ``block_attention`` does; an attention function of transformers' interface.

    A mask that disfavours keys, as token dropping has it while training, is not rounded: values are those of keys that
    are seen or not, and gradients those of exact attention.
    """
    gate: Any = getattr(module, "block_attention", None)
    is_soft = attention_mask is not None and attention_mask.dtype != torch.bool
    seen = attention_mask > _SEEN if attention_mask is not None and is_soft else attention_mask
    settings: Any = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    is_learned = is_soft and torch.is_grad_enabled() and bool(attention_mask.requires_grad)  # type: ignore[union-attr]
    if gate is None or not gate.ramp.is_active or is_learned:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        exact = plain(module, query_BHQE, key_BGTE, value_BGTE, attention_mask, **settings)[0]
        if gate is None or not gate.ramp.is_active:
            return exact, None
        with torch.no_grad():
            held = block_attention_forward(module, query_BHQE, key_BGTE, value_BGTE, seen, **settings)[0]
            shift = gate.ramp.blend(exact, held) - exact
        return exact + shift, None
    return block_attention_forward(module, query_BHQE, key_BGTE, value_BGTE, seen, **settings)


def _set_implementation(model: nn.Module, paths: tuple[str, ...], name: str) -> None:
    for module in (model, *(get_module(model, path) for path in paths)):
        module.config._attn_implementation = name  # type: ignore[union-attr]


AttentionInterface.register(TRAINING_IMPLEMENTATION, rounded_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(TRAINING_IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION])
