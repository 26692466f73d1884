"""A trained bias per key, as one more channel of the keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress.nn.key_bias_attention import attention_with_key_bias, key_bias_attention
from tests.toys import tiny_bert


def heads(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 5, 4, generator=generator, dtype=dtype) for _ in range(3)]
    bias = torch.randn(2, 1, 1, 5, generator=generator, dtype=dtype)
    bias[0, ..., 4] = -1e4
    return [*(part.requires_grad_() for part in parts), bias.requires_grad_()]


def test_it_equals_attention_with_a_mask_forward_and_in_every_gradient() -> None:
    ours, theirs = heads(), heads()
    out, weights = key_bias_attention(nn.Identity(), *ours)
    expected = F.scaled_dot_product_attention(*theirs[:3], attn_mask=theirs[3]).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-8)
    out.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-9, rtol=1e-7)


def test_the_scaling_of_the_model_is_used() -> None:
    query, key, value, bias = heads()
    out, _ = key_bias_attention(nn.Identity(), query, key, value, bias, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(
    ("tokens", "is_training", "used"), [(400, True, True), (400, False, False), (8, True, False)]
)
def test_it_is_used_for_long_texts_while_training_and_taken_back(
    tokens: int, is_training: bool, used: bool
) -> None:
    config = tiny_bert().config
    before = config._attn_implementation
    with attention_with_key_bias(config, tokens, is_training):
        assert (config._attn_implementation == "lightning_compress_key_bias") == used
    assert config._attn_implementation == before


def test_a_failing_pass_leaves_the_model_as_it_was() -> None:
    config = tiny_bert().config
    with pytest.raises(RuntimeError, match="boom"), attention_with_key_bias(config, 400, True):
        raise RuntimeError("boom")
    assert config._attn_implementation == "sdpa"
