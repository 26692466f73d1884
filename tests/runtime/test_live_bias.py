import gc
import weakref

import pytest
import torch
from torch import nn

from lightning_compress.runtime.live_bias import LiveBias


def layer(*numbers: float) -> nn.Linear:
    linear = nn.Linear(2, len(numbers))
    linear.bias = nn.Parameter(torch.tensor(numbers))
    return linear


def test_biases_of_several_layers_stand_in_a_row():
    bias = LiveBias([layer(1.0, 2.0), layer(3.0)])(torch.bfloat16)
    assert bias is not None and not bias.requires_grad
    assert torch.equal(bias, torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))


def fused(linear: nn.Linear) -> None:
    linear.bias.grad = torch.ones(3)
    torch.optim.AdamW([linear.bias], lr=0.5, weight_decay=0.0, fused=True).step()


def stepped(linear: nn.Linear) -> None:
    linear.bias.sum().backward()
    torch.optim.SGD([linear.bias], lr=0.5).step()


def replaced(linear: nn.Linear) -> None:
    linear.bias = nn.Parameter(linear.bias.detach() - 0.5)


def written(linear: nn.Linear) -> None:
    linear.bias.data.sub_(0.5)


def exchanged(linear: nn.Linear) -> None:
    linear.bias.data = linear.bias.data - 0.5


@pytest.mark.parametrize("change", [stepped, fused, replaced, written, exchanged])
@pytest.mark.parametrize("several", [False, True])
def test_whatever_changes_a_bias_is_seen(change, several):
    linear = layer(0.0, 0.0, 0.0)
    live = LiveBias([linear, layer(7.0)] if several else [linear])
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(live(dtype)[:3], torch.zeros(3, dtype=dtype))
    change(linear)
    for dtype in (torch.bfloat16, torch.float32):
        torch.testing.assert_close(live(dtype)[:3], torch.full((3,), -0.5, dtype=dtype))


def test_a_bias_made_in_inference_mode_serves_too_and_its_changes_are_seen():
    with torch.inference_mode():
        linear = layer(1.0, 1.0)
        live = LiveBias([linear])
        live(torch.bfloat16)
        linear.bias.add_(1.0)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(live(dtype), torch.full((2,), 2.0, dtype=dtype))


def test_a_single_bias_in_the_wanted_dtype_is_not_copied():
    linear = layer(1.0, 2.0)
    assert LiveBias([linear])(torch.float32).data_ptr() == linear.bias.data_ptr()


def test_layers_are_not_kept_alive():
    linear = layer(1.0)
    linear.live = LiveBias([linear])  # as an engine of its own has
    gone = weakref.ref(linear)
    gc.disable()
    try:
        del linear
        assert gone() is None
    finally:
        gc.enable()


def test_no_bias_is_none():
    assert LiveBias([nn.Linear(2, 1, bias=False), nn.Linear(2, 3, bias=False)])(torch.float32) is None
    assert LiveBias.of(None)(torch.float32) is None


def test_what_is_live_already_stays():
    live = LiveBias.of(torch.ones(2))
    assert LiveBias.of(live) is live and torch.equal(live(torch.float32), torch.ones(2))


def test_layers_of_which_only_some_have_a_bias_cannot_be_joined():
    with pytest.raises(ValueError, match="cannot be joined"):
        LiveBias([layer(1.0), nn.Linear(2, 1, bias=False)])
