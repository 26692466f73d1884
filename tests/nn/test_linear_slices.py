"""Slices of single layers: the kept outputs are those of the whole layer with the other inputs at zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.linear_slices import keep_rows, slice_at, slice_linear
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from lightning_compress.nn.surgery import Ledger, linear_shape

INPUTS, OUTPUTS = [0, 2, 3], [1, 4, 5, 6]


def dense() -> nn.Module:
    return nn.Linear(5, 7)


def without_bias() -> nn.Module:
    return nn.Linear(5, 7, bias=False)


def transposed() -> nn.Module:
    conv = Conv1D(7, 5)
    nn.init.normal_(conv.bias)
    return conv


def open_layer() -> nn.Module:
    return SoftThresholdLinear(nn.Linear(5, 7))


def gated_layer() -> nn.Module:
    layer = SoftThresholdLinear(nn.Linear(5, 7))
    with torch.no_grad():
        layer.alpha.fill_(float((layer.sigma_M / layer.scale).sort().values[1]))
    layer.enter("gated")
    return layer


def pinned_layer() -> nn.Module:
    layer = SoftThresholdLinear(transposed())
    layer.pin(torch.tensor([True, False, True, True, False]))
    return layer


def low_rank() -> nn.Module:
    return LowRankLinear(nn.Linear(5, 2, bias=False), nn.Linear(2, 7))


FORMS = [dense, without_bias, transposed, open_layer, gated_layer, pinned_layer, low_rank]


def scattered(x_NK: Tensor, kept: list[int], size: int) -> Tensor:
    x_NI = x_NK.new_zeros(len(x_NK), size)
    for place, index in enumerate(kept):
        x_NI[:, index] = x_NK[:, place]
    return x_NI


@pytest.mark.parametrize("form", FORMS)
def test_a_slice_computes_what_the_whole_layer_does_with_the_other_inputs_at_zero(form) -> None:
    layer, x_NK = form(), torch.randn(6, 3)
    with torch.no_grad():
        expected = layer(scattered(x_NK, INPUTS, 5))[:, OUTPUTS]
        slice_linear(layer, INPUTS, OUTPUTS)
        assert torch.allclose(layer(x_NK), expected, atol=1e-6)
    assert linear_shape(layer) == (3, 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("inputs", "outputs", "shape"), [(INPUTS, None, (3, 7)), (None, OUTPUTS, (5, 4))])
def test_either_side_may_stay(form, inputs, outputs, shape) -> None:
    layer, x_NI = form(), torch.randn(6, 5)
    if inputs is not None:
        x_NI = scattered(x_NI[:, inputs], inputs, 5)
    with torch.no_grad():
        expected = layer(x_NI)[:, slice(None) if outputs is None else outputs]
        slice_linear(layer, inputs, outputs)
        assert torch.allclose(layer(x_NI if inputs is None else x_NI[:, inputs]), expected, atol=1e-6)
    assert linear_shape(layer) == shape


@pytest.mark.parametrize("form", FORMS)
def test_keeping_all_changes_no_weight(form) -> None:
    layer = form()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    slice_linear(layer, range(5), range(7))
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_frozen_weights_stay_frozen(form) -> None:
    layer = form()
    layer.requires_grad_(False)
    slice_linear(layer, INPUTS, OUTPUTS)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_the_slice_owns_its_memory() -> None:
    linear = nn.Linear(5, 7)
    slice_linear(linear, None, [0, 1])
    assert linear.weight.is_leaf and linear.weight.untyped_storage().nbytes() == 2 * 5 * 4


def test_a_layer_that_is_still_open_is_decomposed_anew_at_its_smaller_size() -> None:
    layer = SoftThresholdLinear(nn.Linear(5, 7))
    slice_linear(layer, outputs=[0, 1])
    singular = torch.linalg.svdvals(layer.weight)
    assert layer.full_rank == 2 and torch.allclose(layer.sigma_M, singular, atol=1e-6)
    layer.factorise()
    assert torch.allclose(layer.sigma_M, singular, atol=1e-6)


def test_moments_of_kept_inputs_stay_counted() -> None:
    layer = SoftThresholdLinear(nn.Linear(3, 4)).train()
    layer.enter("open", calibrate=True)
    x_NI = torch.randn(6, 3)
    layer(x_NI)
    slice_linear(layer, inputs=[0, 2])
    assert torch.allclose(layer.moment_II, x_NI[:, [0, 2]].T @ x_NI[:, [0, 2]], atol=1e-5)


def test_what_is_no_linear_is_refused() -> None:
    with pytest.raises(TypeError, match="GELU is no linear layer that can be sliced"):
        slice_linear(nn.GELU(), [0])


def test_rows_come_in_the_order_given() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), requires_grad=False)
    kept = keep_rows(parameter, [1, 0], dim=1)
    assert kept.tolist() == [[2.0, 1.0], [4.0, 3.0]] and not kept.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_a_noted_slice_can_be_reverted_to_the_dense_layer(form) -> None:
    model = nn.Sequential(form())
    expected = Conv1D if form in (transposed, pinned_layer) else nn.Linear
    ledger = Ledger(model)
    slice_at(ledger, "0", INPUTS, OUTPUTS)
    ledger.revert()
    assert linear_shape(model[0]) == (5, 7)
    if form is not low_rank:
        assert type(model[0]) is expected


def test_optimizers_can_follow_a_slice() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    weight, bias = model[0].weight, model[0].bias
    ledger = Ledger(model)
    slice_at(ledger, "0", inputs=INPUTS)
    assert model[0].bias is bias
    assert ledger.successors() == {id(weight): [model[0].weight]}


class Adapter(nn.Module):
    """Laid out as peft's LoRA layer is."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = nn.Linear(5, 7), 5, 7
        self.lora_A = nn.ModuleDict({"one": nn.Linear(5, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"one": nn.Linear(2, 7, bias=False)})

    def forward(self, x_NI: Tensor) -> Tensor:
        return self.base_layer(x_NI) + self.lora_B["one"](self.lora_A["one"](x_NI))


def test_adapters_are_sliced_with_the_layer_they_are_around() -> None:
    model, x_NK = nn.Sequential(Adapter()), torch.randn(6, 3)
    ledger = Ledger(model)
    with torch.no_grad():
        expected = model(scattered(x_NK, INPUTS, 5))[:, OUTPUTS]
        slice_at(ledger, "0", INPUTS, OUTPUTS)
        assert torch.allclose(model(x_NK), expected, atol=1e-6)
    assert (model[0].in_features, model[0].out_features) == (3, 4)
    ledger.revert()
    assert (model[0].in_features, model[0].out_features) == (5, 7)
    assert model[0](torch.ones(1, 5)).shape == (1, 7)
