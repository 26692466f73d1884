from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_attention import BlockAttention
from lightning_compress.nn.rounded_attention import (
    TRAINING_IMPLEMENTATION,
    RoundedAttention,
    attend_in_training,
    rounded_attention_forward,
)
from lightning_compress.nn.rounded_operators import Ramp
from lightning_compress.nn.surgery import Ledger, get_module
from tests.toys import tiny_bert

ATTENTION = BlockAttention(BlockFormat(8), softmax=True)
MASK = torch.tensor([[True, True, True, False, True]])[:, None, None, :]


def operands(heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    return query, key[:, :heads], value[:, :heads]


def rounded(value: float) -> RoundedAttention:
    ramp = Ramp()
    ramp.set(value)
    return RoundedAttention(ATTENTION, ramp)


def exact(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = query @ key.mT / 2.0
    return (logits if bias is None else logits + bias).softmax(-1) @ value


class Holder(nn.Module):
    """Stands for a family's attention module."""

    is_causal = False

    def __init__(self, attention: RoundedAttention | None) -> None:
        super().__init__()
        self.block_attention = attention


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_lies_between_the_exact_and_the_quantised_one(heads: int) -> None:
    query, key, value = operands(heads)
    wide = (part.expand(-1, 2, -1, -1) for part in (key, value))
    plain = exact(query, *wide, bias=torch.where(MASK, 0.0, -torch.inf))
    full, weights = ATTENTION(query, key, value, MASK)
    for strength, expected in ((0.0, plain), (0.25, 0.75 * plain + 0.25 * full), (1.0, full)):
        out, seen = rounded(strength)(query, key, value, MASK)
        assert torch.allclose(out, expected, atol=1e-5)
        assert torch.equal(seen, weights) if strength == 1.0 else seen is None  # type: ignore[arg-type]
    assert not torch.allclose(plain, full, atol=1e-4)


def test_an_additive_mask_that_nobody_learns_is_read_as_seen_or_not() -> None:
    query, key, value = operands()
    bias = torch.where(MASK, 0.0, -1e4)
    out, _ = rounded_attention_forward(Holder(rounded(1.0)), query, key, value, bias)
    assert torch.equal(out, ATTENTION(query, key, value, MASK)[0].transpose(1, 2))
    out, _ = rounded_attention_forward(Holder(rounded(0.0)), query, key, value, bias)
    assert torch.allclose(out, exact(query, key, value, bias).transpose(1, 2), atol=1e-6)


def test_a_mask_that_is_learned_gets_the_gradient_of_exact_attention() -> None:
    query, key, value = operands()
    bias = torch.where(MASK, -0.05, -1e4).requires_grad_()
    out, _ = rounded_attention_forward(Holder(rounded(1.0)), query, key, value, bias)
    assert torch.allclose(out, ATTENTION(query, key, value, MASK)[0].transpose(1, 2), atol=1e-6)
    (gradient,) = torch.autograd.grad(out.pow(2).sum(), bias)
    factor = 2 * out.detach().transpose(1, 2)
    (expected,) = torch.autograd.grad((factor * exact(query, key, value, bias)).sum(), bias)
    assert gradient.abs().max() > 1e-3 and torch.allclose(gradient, expected, atol=1e-5)


def test_a_module_without_a_gate_attends_exactly() -> None:
    query, key, value = operands()
    out, _ = rounded_attention_forward(Holder(None), query, key, value, MASK)
    assert torch.allclose(
        out, exact(query, key, value, torch.where(MASK, 0.0, -torch.inf)).transpose(1, 2), atol=1e-6
    )


def test_the_ledger_puts_the_family_s_attention_back() -> None:
    model, ids = tiny_bert().eval(), torch.tensor([[2, 5, 6, 7], [2, 8, 0, 0]])
    mask = (ids > 0).long()
    paths = [str(layer.attention) for layer in describe(model).layers]
    with torch.no_grad():
        before = model(ids, mask).logits
        ledger, gate = Ledger(model), rounded(0.0)
        attend_in_training(ledger, paths, gate)
        assert model.config._attn_implementation == TRAINING_IMPLEMENTATION
        assert torch.allclose(model(ids, mask).logits, before, atol=1e-6)
        gate.ramp.set(1.0)
        assert 0.0 < float((model(ids, mask).logits - before).abs().max()) < 0.01
        ledger.revert()
        assert torch.equal(model(ids, mask).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert all(getattr(get_module(model, path), "block_attention", None) is None for path in paths)


def test_queries_of_a_decoder_see_the_past_only() -> None:
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    attend_in_training(Ledger(model), ["model.layers.0.self_attn"], rounded(0.5))
    ids = torch.tensor([[1, 5, 9, 11]])
    with torch.no_grad():
        whole, short = model(ids).logits, model(ids[:, :3]).logits
    assert torch.allclose(whole[:, :3], short, atol=1e-6)
