"""What policies share: tokens that nobody may drop."""

from __future__ import annotations

import torch

from lightning_compress.nn.token_policy import TokenPolicy


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
