from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import QuantizedActivation, QuantizedNorm
from lightning_compress.nn.rounded_operators import (
    Ramp,
    rounded_activation,
    rounded_linear,
    rounded_norm,
    rounded_product,
    scattered,
    selected,
)
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear

W4, A8 = BlockFormat(4), BlockFormat(8)
SHIFTS = BlockFormat(4, (2, 4), "shift"), BlockFormat(8, (1, 4), "shift")


def ramp(value: float) -> Ramp:
    made = Ramp()
    made.set(value)
    return made


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_a_ramp_knows_its_ends_and_lies_between_them() -> None:
    states = [(made.value, made.is_active, made.is_full) for made in map(ramp, (0.0, 0.5, 1.0))]
    assert states == [(0.0, False, False), (0.5, True, False), (1.0, True, True)]
    exact, held = torch.tensor([2.0]), torch.tensor([4.0])
    assert [float(ramp(value).blend(exact, held)) for value in (0.0, 0.5, 1.0)] == [2.0, 3.0, 4.0]


def test_integers_are_those_of_deployment_only_in_full_and_without_gradients() -> None:
    assert not ramp(1.0).is_as_deployed
    with torch.no_grad():
        assert ramp(1.0).is_as_deployed and not ramp(0.99).is_as_deployed


def test_a_product_is_rounded_by_hand_and_by_degrees() -> None:
    weight = torch.tensor([[7.0, 1.4]])  # in 4 bits steps of 1: 7 and 1
    x = torch.tensor([[127.0, 3.4]])  # in 8 bits steps of 1: 127 and 3
    exact, full = 127 * 7 + 3.4 * 1.4, 127 * 7 + 3 * 1
    halfway = 127 * 7 + 3.2 * 1.2
    for value, expected in ((0.0, exact), (0.5, halfway), (1.0, full)):
        assert float(rounded_product(x, weight, None, ramp(value), W4, A8)) == pytest.approx(
            expected, rel=1e-6
        )


@pytest.mark.parametrize("kind", [nn.Linear, lambda i, o: Conv1D(o, i)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(("weight", "inputs"), [(W4, A8), SHIFTS, (W4, None)])
def test_a_linear_without_gradients_is_the_quantised_one_bit_for_bit(kind, weight, inputs) -> None:
    linear, x = kind(12, 6), torch.randn(2, 3, 12)
    with torch.no_grad():
        deployed = QuantizedLinear.from_linear(linear, weight, inputs)(x)
        rounded = rounded_linear(linear, x, ramp(1.0), None, None, weight=weight, inputs=inputs)
    assert torch.equal(rounded, deployed)
    learned = rounded_linear(linear, x, ramp(1.0), None, None, weight=weight, inputs=inputs)
    assert (
        torch.equal(learned, deployed)
        if inputs == SHIFTS[1]
        else torch.allclose(learned, deployed, atol=1e-5)
    )


def test_gradients_reach_weight_input_and_bias_as_if_the_rounded_numbers_were_there() -> None:
    linear, x = nn.Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    rounded_linear(linear, x, ramp(1.0), None, None, weight=W4, inputs=A8).sum().backward()
    quantised = QuantizedLinear.from_linear(linear, W4, A8)
    assert x.grad is not None and linear.weight.grad is not None and linear.bias.grad is not None
    assert torch.allclose(x.grad, quantised.dequantized_weight().sum(0).expand(5, 4))
    assert torch.allclose(linear.weight.grad[0], x.detach().sum(0), atol=0.1)
    assert torch.equal(linear.bias.grad, torch.full((3,), 5.0))


def test_closed_features_are_rounded_as_if_they_had_been_cut_off() -> None:
    linear, x = nn.Linear(6, 5), torch.randn(2, 6)
    linear.weight.data[:, 1] = 100.0  # would decide every factor
    inputs, outputs = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])
    small = nn.Linear(4, 2)
    small.weight.data, small.bias.data = linear.weight.data[outputs][:, inputs], linear.bias.data[outputs]
    with torch.no_grad():
        rounded = rounded_linear(linear, x, ramp(1.0), inputs, outputs, weight=W4, inputs=A8)
        deployed = QuantizedLinear.from_linear(small, W4, A8)(x[:, inputs])
    assert torch.equal(rounded[:, outputs], deployed)
    assert torch.equal(rounded[:, [0, 2, 3]], torch.zeros(2, 3))


@pytest.mark.parametrize("kept", [None, torch.tensor([0, 1, 2, 4, 5, 7])])
@pytest.mark.parametrize("rank", [2, 7])
def test_a_learned_rank_is_rounded_as_the_layer_that_it_will_be(rank: int, kept: torch.Tensor | None) -> None:
    layer, x = SoftThresholdLinear(nn.Linear(8, 8)), torch.randn(3, 8)
    layer.pin(torch.arange(8) < rank)
    with torch.no_grad():
        rounded = rounded_linear(layer, x, ramp(1.0), kept, None, weight=W4, inputs=A8)
        u, scaled = layer._factors()
        scaled, x = (scaled, x) if kept is None else (scaled[:, kept], x[:, kept])
        down, up = nn.Linear(x.shape[1], rank, bias=False), nn.Linear(rank, 8)
        down.weight.data, up.weight.data, up.bias.data = scaled, u, layer.bias.data  # type: ignore[union-attr]
        parts = list(LowRankLinear(down, up)) if rank == 2 else [nn.Linear(x.shape[1], 8)]
        if rank == 7:
            parts[0].weight.data, parts[0].bias.data = u @ scaled, layer.bias.data  # type: ignore[union-attr]
        for part in parts:
            x = QuantizedLinear.from_linear(part, W4, A8)(x)
    assert torch.equal(rounded, x)


def test_norms_and_activations_are_those_of_integers_over_what_counts() -> None:
    norm, x, kept = nn.LayerNorm(6), torch.randn(4, 6), torch.tensor([0, 1, 5])
    nn.init.normal_(norm.weight)
    whole = rounded_norm(norm, x, norm(x), ramp(1.0), None)
    assert torch.equal(whole, QuantizedNorm(norm)(x))
    small = nn.LayerNorm(3)
    small.weight.data, small.bias.data = norm.weight.data[kept], norm.bias.data[kept]
    narrow = rounded_norm(norm, x, norm(x), ramp(1.0), kept)
    assert torch.equal(narrow[:, kept], QuantizedNorm(small)(x[:, kept]))
    assert not narrow[:, 2:5].any()
    gelu, output = QuantizedActivation("gelu"), nn.functional.gelu(x)
    assert torch.equal(rounded_activation(x, output, ramp(1.0), None, function="gelu"), gelu(x))
    halfway = rounded_activation(x, output, ramp(0.5), None, function="gelu")
    assert torch.allclose(halfway, (output + gelu(x)) / 2)
    narrow = rounded_activation(x, output, ramp(1.0), kept, function="gelu")
    assert torch.equal(narrow[:, kept], gelu(x[:, kept]))


def test_selecting_and_scattering_leave_whole_things_alone() -> None:
    x, kept = torch.arange(4.0), torch.tensor([1, 3])
    assert selected(x, None) is x and selected(None, kept) is None and scattered(x, None, 9) is x
    assert torch.equal(scattered(selected(x, kept), kept, 4), torch.tensor([0.0, 1.0, 0.0, 3.0]))
