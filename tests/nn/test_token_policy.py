"""What policies share: tokens that nobody may drop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.nn.segments import Segments
from lightning_compress.nn.token_policy import TokenPolicy, at_least_float


def test_the_first_real_tokens_are_protected_wherever_the_padding_is() -> None:
    real_BT = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
    protected_BT = TokenPolicy([0], protect_first=2).protected(real_BT)
    assert protected_BT.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_tokens_protected_for_what_they_are_come_on_top_but_never_padding() -> None:
    policy = TokenPolicy([0])
    policy.guarded_BT = torch.tensor([[False, False, True, True]])
    protected_BT = policy.protected(torch.tensor([[True, True, True, False]]))
    assert protected_BT.tolist() == [[True, False, True, False]]


def test_the_dial_is_part_of_the_state_and_starts_as_trained() -> None:
    policy = TokenPolicy((1, 3))
    assert policy.layers == (1, 3)
    assert {name: float(value) for name, value in policy.state_dict().items()} == {"scale": 1.0}


def test_protected_rows_and_the_first_of_each_sequence_join_those_that_stay() -> None:
    real_BT = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    nobody_N = torch.zeros(5, dtype=torch.bool)
    policy = TokenPolicy([0])
    assert policy.with_protected(nobody_N.clone(), Segments.of(real_BT)).int().tolist() == [1, 0, 0, 1, 0]
    guarded_BT = torch.tensor([[0, 0, 1], [0, 0, 0]]).bool()
    keep_N = policy.with_protected(nobody_N.clone(), Segments.of(real_BT, guarded_BT))
    assert keep_N.int().tolist() == [1, 0, 1, 1, 0]


class Exact(TokenPolicy):
    """A policy with a threshold that learns, and weights."""

    exact_tensors = ("eta", "scale")

    def __init__(self) -> None:
        super().__init__([0])
        self.eta = nn.Parameter(torch.tensor(0.1234567))
        self.weight = nn.Parameter(torch.tensor(0.1234567))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_that_are_named_exact_are_cast_to_no_less_than_float32(dtype: torch.dtype) -> None:
    policy = Exact()
    eta, before = policy.eta, policy.eta.detach().clone()
    nn.Sequential(policy).to(dtype)
    assert policy.weight.dtype == dtype and policy.eta is eta
    assert eta.dtype == policy.scale.dtype == (torch.float64 if dtype.itemsize == 8 else torch.float32)
    assert torch.equal(eta.detach(), before.to(eta.dtype))
    assert TokenPolicy([0]).to(dtype).scale.dtype == dtype


def test_half_precision_is_widened_and_nothing_else() -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [at_least_float(torch.zeros((), dtype=dtype)).dtype for dtype in dtypes] == [
        torch.float32, torch.float32, torch.float32, torch.float64
    ]  # fmt: skip
