"""Attention with a trained bias per key that keeps the fused kernel: the bias travels as one more channel of the keys.

A mask that needs gradients makes torch fall back to unfused attention, twice as slow on long texts. A bias that is the
same for all queries is a product: ``q . k + b = [q, 1] . [k, b]``. Used by :mod:`lightning_compress.nn.dropping` while
training.

Shape legend: B batch, H heads, T tokens, E head width, X added channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

__all__ = ["attention_with_key_bias", "key_bias_attention"]

_NAME = "lightning_compress_key_bias"
_CHANNELS = 8
"""Channels added to each head, of which one is used: widths that are multiples of 8 run faster."""
_LONG = 192
"""Tokens from which the fused kernel pays for the wider heads."""


def key_bias_attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BHTE: Tensor,
    value_BHTE: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with an additive mask ``[B, 1, 1, T]``; an attention function of transformers' interface.

    Returns:
        The result as ``[B, T, H, E]``, and no weights.
    """
    width = query_BHTE.shape[-1]
    scaling = 1.0 / math.sqrt(width) if scaling is None else scaling
    bias_B1T1 = attention_mask.transpose(-1, -2) / scaling
    ones = F.pad(query_BHTE.new_ones((*query_BHTE.shape[:-1], 1)), (0, _CHANNELS - 1))
    bias = F.pad(bias_B1T1.to(key_BHTE.dtype), (0, _CHANNELS - 1)).expand(*key_BHTE.shape[:-1], _CHANNELS)
    out_BHTE = F.scaled_dot_product_attention(
        torch.cat([query_BHTE, ones], dim=-1),
        torch.cat([key_BHTE, bias], dim=-1),
        F.pad(value_BHTE, (0, _CHANNELS)),
        dropout_p=dropout,
        scale=scaling,
    )
    return out_BHTE[..., :width].transpose(1, 2), None


@contextmanager
def attention_with_key_bias(config: Any, tokens: int, is_training: bool) -> Iterator[None]:
    """Let layers with this configuration attend by :func:`key_bias_attention` where that is faster.

    Args:
        config: The layers' configuration.
        tokens: Padded length T.
        is_training: Whether the bias needs gradients.
    """
    before = config._attn_implementation
    if not is_training or tokens < _LONG or before != "sdpa":
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(_NAME, key_bias_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
