import pytest
import torch
from torch import nn

from lightning_compress.runtime.live_bias import LiveBias


def test_biases_of_several_layers_stand_in_a_row():
    parts = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))]
    bias = LiveBias(parts)(torch.bfloat16)
    assert bias is not None and not bias.requires_grad
    assert torch.equal(bias, torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))


def test_a_step_of_an_optimizer_is_seen():
    parameter = nn.Parameter(torch.zeros(3))
    live = LiveBias([parameter])
    assert torch.equal(live(torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16))
    parameter.sum().backward()
    torch.optim.SGD([parameter], lr=0.5).step()
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(live(dtype), torch.full((3,), -0.5, dtype=dtype))


def test_what_has_not_changed_is_cast_once():
    live = LiveBias([nn.Parameter(torch.ones(2))])
    assert live(torch.bfloat16) is live(torch.bfloat16)


def test_a_bias_made_in_inference_mode_serves_too():
    with torch.inference_mode():
        bias_N = torch.ones(2)
    assert torch.equal(LiveBias([bias_N])(torch.float32), torch.ones(2))


def test_no_bias_is_none():
    assert LiveBias([None, None])(torch.float32) is None
    assert LiveBias.of(None)(torch.float32) is None


def test_what_is_live_already_stays():
    live = LiveBias([torch.ones(2)])
    assert LiveBias.of(live) is live


def test_layers_of_which_only_some_have_a_bias_cannot_be_joined():
    with pytest.raises(ValueError, match="cannot be joined"):
        LiveBias([torch.ones(2), None])
