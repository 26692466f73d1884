"""Float functions that compute in integers: their rows hold whole numbers, and their gradients are the exact ones."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.nn.integer_functional import (
    LOGIT_BITS,
    ROW_BITS,
    activation_of_integers,
    layernorm_of_integers,
    rmsnorm_of_integers,
    softmax_of_integers,
)
from lightning_compress.ops.fixed_point import align_rows
from lightning_compress.ops.integer_gelu import FUNCTIONS, integer_gelu
from lightning_compress.ops.integer_layernorm import fixed_point_affine, integer_layernorm
from lightning_compress.ops.integer_softmax import integer_softmax_by_row, softmax_factor

WEIGHT, BIAS = torch.linspace(0.5, 2.0, 6), torch.linspace(-1.0, 1.0, 6)
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    **{name: (lambda x, name=name: activation_of_integers(x, name), EXACT[name]) for name in FUNCTIONS},
    "softmax": (lambda x: softmax_of_integers(x, None, 0.5), lambda x: (x * 0.5).softmax(-1)),
    "layernorm": (
        lambda x: layernorm_of_integers(x, WEIGHT, BIAS, 1e-5),
        lambda x: F.layer_norm(x, (6,), WEIGHT, BIAS, 1e-5),
    ),
    "rmsnorm": (
        lambda x: rmsnorm_of_integers(x, WEIGHT, 1e-5),
        lambda x: F.rms_norm(x, (6,), WEIGHT, 1e-5),
    ),
}


def held_slowly(value: Tensor, exponent: Tensor) -> list[list[float]]:
    return [[math.ldexp(x, e) for x in row] for row, e in zip(value.tolist(), exponent.tolist(), strict=True)]


def test_the_floats_are_the_integers_of_the_operators():
    x = torch.randn(4, 6) * torch.tensor([1e-3, 1.0, 30.0, 0.0])[:, None]
    value, exponent = align_rows(x, ROW_BITS)
    assert activation_of_integers(x, "silu").tolist() == held_slowly(*integer_gelu(value, exponent, "silu"))
    affine = fixed_point_affine(WEIGHT, BIAS)
    expected = held_slowly(*integer_layernorm(value, exponent, affine, 1e-5))
    assert layernorm_of_integers(x, WEIGHT, BIAS, 1e-5).tolist() == expected
    plain = fixed_point_affine(WEIGHT)
    expected = held_slowly(*integer_layernorm(value, exponent, plain, 1e-6, is_centred=False))
    assert rmsnorm_of_integers(x, WEIGHT, affine=plain).tolist() == expected
    seen = torch.rand(4, 6) < 0.5
    logits, exponent = align_rows(x.masked_fill(~seen, 0.0), LOGIT_BITS)
    expected = held_slowly(*integer_softmax_by_row(logits, exponent, softmax_factor(0.25), seen))
    assert softmax_of_integers(x, seen, 0.25).tolist() == expected


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(PAIRS)),
    rows=st.lists(st.sampled_from(["zeros", "constant", "normal", "outlier"]), min_size=1, max_size=4),
    size=st.sampled_from([1e-2, 1.0, 8.0]),
)
def test_they_are_near_the_exact_functions(name: str, rows: list[str], size: float):
    integers, exact = PAIRS[name]
    kinds = {
        "zeros": torch.zeros(6),
        "constant": torch.full((6,), size),
        "normal": torch.randn(6) * size,
        "outlier": torch.randn(6) * size * torch.tensor([1000.0, 1, 1, 1, 1, 1]),
    }
    x = torch.stack([kinds[kind] for kind in rows])
    error = (integers(x) - exact(x)).abs()
    step = x.abs().amax(1, keepdim=True) * 2.0**-15  # what 16 bits round away, at most
    if name.startswith("softmax"):
        bound = torch.full_like(error, 1.02 / 256)
    elif name in FUNCTIONS:
        bound = 1.13 * step + 1.6e-4 + 2.0**-16
    else:
        scale = (
            (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            if name == "layernorm"
            else (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
        )
        bound = 2 * (8 * step / scale + 1e-4)  # 2: the largest weight
    assert bool((error <= bound).all())


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_gradients_are_those_of_the_exact_function(name: str):
    integers, exact = PAIRS[name]
    x, weights = torch.randn(3, 2, 6), torch.randn(3, 2, 6)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = integers(ours)
    (found * weights).sum().backward()
    (exact(theirs) * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad) and ours.grad.any()
    assert torch.equal(found.detach(), integers(x))
    with torch.no_grad():
        assert not integers(ours).requires_grad


def test_norms_pass_gradients_to_their_weights():
    x, weight, bias = torch.randn(3, 6), WEIGHT.clone().requires_grad_(), BIAS.clone().requires_grad_()
    layernorm_of_integers(x, weight, bias, 1e-5).sum().backward()
    normal = F.layer_norm(x, (6,), eps=1e-5)
    torch.testing.assert_close(weight.grad, normal.sum(0))
    assert bias.grad.tolist() == [3.0] * 6
    weight.grad = None
    rmsnorm_of_integers(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, F.rms_norm(x, (6,), eps=1e-6).sum(0))


def test_what_is_not_seen_may_be_anything_and_gets_no_gradient():
    logits = torch.tensor([[1.0, -math.inf, 3.0], [math.nan, 2.0, math.inf]], requires_grad=True)
    seen = torch.tensor([[True, False, True], [False, False, False]])
    found = softmax_of_integers(logits, seen)
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    pair = logits.detach()[0, [0, 2]].requires_grad_()
    (pair.softmax(0) * torch.tensor([1.0, 3.0])).sum().backward()
    torch.testing.assert_close(logits.grad[0, [0, 2]], pair.grad)
    assert found[0, 1] == 0 and found[1].tolist() == [0.0] * 3
    assert logits.grad[0, 1] == 0 and logits.grad[1].tolist() == [0.0] * 3


def test_a_mask_is_broadcast_over_heads_and_queries():
    logits, seen = torch.randn(2, 3, 4, 5), torch.rand(2, 1, 1, 5) < 0.7
    assert torch.equal(
        softmax_of_integers(logits, seen), softmax_of_integers(logits, seen.expand(2, 3, 4, 5).contiguous())
    )


@pytest.mark.parametrize("name", sorted(PAIRS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_dtype_given(name: str, dtype: torch.dtype):
    integers, _ = PAIRS[name]
    x = torch.randn(2, 6).to(dtype)
    assert torch.equal(integers(x), integers(x.float()).to(dtype))


@pytest.mark.parametrize("name", sorted(PAIRS))
@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6)])
def test_any_leading_sizes_will_do(name: str, shape: tuple[int, ...]):
    integers, exact = PAIRS[name]
    x = torch.randn(shape)
    assert integers(x).shape == shape
    torch.testing.assert_close(integers(x), exact(x), atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_what_is_not_finite_is_refused(name: str):
    with pytest.raises(ValueError, match="inf or NaN"):
        PAIRS[name][0](torch.tensor([[1.0] * 6, [math.nan] * 6]))
