"""Attention whose two products are of integers, with an integer softmax between them.

A family's attention module has a :class:`BlockAttention` as its attribute ``block_attention``; the function that
transformers calls in place of its own finds it there. The packed engine calls it directly, see
:mod:`lightning_compress.runtime.block`. The next chapter is :mod:`lightning_compress.nn.operator_formats`.

Shape legend: B batch, H heads, G key-value heads, Q queries, T keys, E head width.

Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483) name softmax and all products; their bodies were not readable:
BCT-style, our own design.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.fake_quantize import fake_block_matmul, fake_quantize
from lightning_compress.nn.integer_functional import softmax_of_integers
from lightning_compress.ops.block_matmul import block_matmul
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.fixed_point import align_rows, held_in_floats

__all__ = ["IMPLEMENTATION", "BlockAttention", "block_attention_forward"]

IMPLEMENTATION = "lightning_compress_block"
"""Name of this attention in transformers' registry, and in ``config._attn_implementation``."""

WEIGHT_BITS = 9
"""Of attention weights, with the sign that they do not have."""


@dataclass(frozen=True)
class BlockAttention:
    """How one layer attends: ``P = softmax(Q K^T scale)``, then ``P V``.

    Each head's query, key and value are matrices ``[tokens, E]`` in blocks of their own. A row of P is integers of 8
    bits, without a sign, times a power of two of its own: rows that spread over hundreds of keys keep their digits.
    A token's value has a factor of its own, so that P V sums products of different exponents. With shifts that is done
    without rounding, in float64 as an integer of 64 bits would: neither padding nor later tokens change a bit of a
    result, unless one factor is for all tokens. With scales they are summed in float32, in whatever order is fast.

    Raises:
        ValueError: If nothing is quantised, or blocks hold several rows but not all.

    Example:
        >>> attend = BlockAttention(BlockFormat(8, factor="shift"), softmax=True)
        >>> rows = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
        >>> attend(rows, rows, rows)[1]  # of the exponentials of 0.71 and 0
        tensor([[[[0.6680, 0.3320],
                  [0.3320, 0.6680]]]])
    """

    operands: BlockFormat | None = None
    """Format of query, key and value; None leaves them as they are."""
    softmax: bool = False
    """Whether the softmax is computed in integers; otherwise exactly, and rounded where operands are."""

    def __post_init__(self) -> None:
        if self.operands is None and not self.softmax:
            raise ValueError("neither operands nor softmax are quantised: leave the attention as it is")
        if self.operands is not None and self.operands.block[0] > 1:
            raise ValueError(
                f"blocks of attention's operands hold {self.operands.block[0]} tokens: give 1, or 0 for all"
            )

    def __call__(
        self,
        query_BHQE: Tensor,
        key_BGTE: Tensor,
        value_BGTE: Tensor,
        seen: Tensor | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Attend; gradients pass straight through whatever rounds.

        Args:
            query_BHQE: Queries.
            key_BGTE: Keys; each serves H / G heads of queries.
            value_BGTE: Values.
            seen: False where a query is not to see a key, ``[B, 1, Q, T]`` or broadcast over it; None sees all. What
                no query sees is not looked at. A query that sees nothing gets zeros.
            scale: Factor of the products, at most 2; None is ``E ** -0.5``.
            dropout: Probability with which attention weights are dropped.

        Returns:
            What was attended to ``[B, H, Q, E]`` and the weights ``[B, H, Q, T]``, in the dtype of the queries.
        """
        scaling = query_BHQE.shape[-1] ** -0.5 if scale is None else scale
        if seen is not None and seen.shape[1] == 1:  # what nobody sees must not decide on factors
            hidden_B1T1 = ~seen.any(-2).unsqueeze(-1)
            key_BGTE, value_BGTE = (rows.masked_fill(hidden_B1T1, 0.0) for rows in (key_BGTE, value_BGTE))
        groups = query_BHQE.shape[1] // key_BGTE.shape[1]
        key_BHTE, value_BHTE = (
            part if groups == 1 else part.repeat_interleave(groups, dim=1) for part in (key_BGTE, value_BGTE)
        )
        logits_BHQT = self._logits(query_BHQE.float(), key_BHTE.float())
        weight_BHQT = F.dropout(self._weights(logits_BHQT, seen, scaling), dropout, training=dropout > 0.0)
        attended_BHQE = self._sum_values(weight_BHQT, value_BHTE.float())
        return attended_BHQE.to(query_BHQE.dtype), weight_BHQT.to(query_BHQE.dtype)

    def _logits(self, query_BHQE: Tensor, key_BHTE: Tensor) -> Tensor:
        held = self.operands
        if held is None:
            return query_BHQE @ key_BHTE.mT
        if torch.is_grad_enabled() and (query_BHQE.requires_grad or key_BHTE.requires_grad):
            return fake_block_matmul(query_BHQE, key_BHTE, held, held)
        queries, keys = (
            block_quantize(rows, held.bits, held.block, held.factor) for rows in (query_BHQE, key_BHTE)
        )
        return block_matmul(*queries, *keys, None, held.block, held.block, held.factor)

    def _weights(self, logits_BHQT: Tensor, seen: Tensor | None, scale: float) -> Tensor:
        if self.softmax:
            return softmax_of_integers(logits_BHQT, seen, scale)
        if seen is not None:
            logits_BHQT = logits_BHQT.masked_fill(~seen, torch.finfo(logits_BHQT.dtype).min)
        exact_BHQT = (logits_BHQT * scale).softmax(-1)
        if seen is not None:
            exact_BHQT = exact_BHQT.masked_fill(~seen, 0.0)
        rounded_RT = held_in_floats(*align_rows(exact_BHQT.detach().flatten(0, -2), WEIGHT_BITS))
        return rounded_RT.view(exact_BHQT.shape) + (
            exact_BHQT - exact_BHQT.detach()
        )  # adds zero; has gradients

    def _sum_values(self, weight_BHQT: Tensor, value_BHTE: Tensor) -> Tensor:
        if self.operands is None:
            return weight_BHQT @ value_BHTE
        held_BHTE = fake_quantize(value_BHTE, self.operands)
        if self.operands.factor == "shift":
            return (weight_BHQT.double() @ held_BHTE.double()).float()
        return weight_BHQT @ held_BHTE


def block_attention_forward(
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

    A module without one attends by ``sdpa``.

    Returns:
        What was attended to, ``[B, Q, H, E]``, and the weights ``[B, H, Q, T]``.

    Raises:
        ValueError: If the mask is not of type bool.
    """
    attend = getattr(module, "block_attention", None)
    if attend is None:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return plain(module, query_BHQE, key_BGTE, value_BGTE, attention_mask, **settings)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"the attention mask is {attention_mask.dtype}, and integer attention sees a key or does not: give a mask "
            "of shape [batch, tokens], or one of type bool"
        )
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = _causal(query_BHQE, key_BGTE)
    attended_BHQE, weight_BHQT = attend(
        query_BHQE, key_BGTE, value_BGTE, attention_mask, scaling, dropout if module.training else 0.0
    )
    return attended_BHQE.transpose(1, 2).contiguous(), weight_BHQT


def _causal(query_BHQE: Tensor, key_BGTE: Tensor) -> Tensor | None:
    """Let each query see the keys up to its own, the last query being that of the last key."""
    queries, keys = query_BHQE.shape[2], key_BGTE.shape[2]
    ones_QT = torch.ones(queries, keys, dtype=torch.bool, device=query_BHQE.device)
    return None if queries == 1 else ones_QT.tril(keys - queries)[None, None]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the mask as ``sdpa`` has it, but never none for causal attention."""
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register(IMPLEMENTATION, block_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
