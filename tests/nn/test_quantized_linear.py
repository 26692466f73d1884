import copy
import io

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.quantized_linear import QuantizedLinear, check_product_formats
from tests.nn.toys_blocks import rounded_slowly

FORMATS = [
    (BlockFormat(8), BlockFormat(8)),
    (BlockFormat(4, (32, 4), "shift"), BlockFormat(8, (1, 4), "shift")),
    (BlockFormat(4, (2, 4)), BlockFormat(4, (1, 4))),
    (BlockFormat(8, (0, 0), "shift"), BlockFormat(8, (0, 0), "shift")),
    (BlockFormat(4, (1, 5)), BlockFormat(8)),
]


def random_linear(inputs: int = 12, outputs: int = 7, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize(("weight", "inputs"), FORMATS, ids=str)
def test_the_output_is_the_product_of_the_rounded_matrices(weight, inputs):
    linear, x_BTK = random_linear(), torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1))
    layer = QuantizedLinear.from_linear(linear, weight, inputs)
    x_MK = rounded_slowly(x_BTK.flatten(0, 1), inputs)
    expected = x_MK @ rounded_slowly(linear.weight.detach(), weight).T + linear.bias.detach().double()
    actual = layer(x_BTK)
    assert actual.shape == (2, 3, 7) and actual.dtype == torch.float32
    of_sums = (
        1e-4 if weight.factor == "shift" and weight.block[1] else 2e-6
    )  # these drop bits behind the guard bits
    torch.testing.assert_close(actual.double().flatten(0, 1), expected, rtol=0.0, atol=of_sums)


def test_a_product_worked_by_hand():
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[7.0, -2.6], [0.4, 1.4]]))  # scales 1 and 0.2: 7 -3, 2 7
        linear.bias.copy_(torch.tensor([0.5, 0.0]))
    layer = QuantizedLinear.from_linear(linear, BlockFormat(4), BlockFormat(8))
    assert layer.weight_int8().tolist() == [[7, -3], [2, 7]]
    output = layer(torch.tensor([127.0, 10.4]))  # scale 1: 127 10
    torch.testing.assert_close(output, torch.tensor([127 * 7 - 30 + 0.5, 0.2 * (254 + 70)]))


def test_weights_alone_are_multiplied_with_inputs_as_they_are():
    linear, x_MK = random_linear(), torch.randn(3, 12)
    held = BlockFormat(4, (1, 4))
    layer = QuantizedLinear.from_linear(linear, held)
    expected = x_MK.double() @ rounded_slowly(linear.weight.detach(), held).T + linear.bias.detach()
    torch.testing.assert_close(layer(x_MK).double(), expected, rtol=1e-5, atol=1e-6)
    assert layer.bfloat16()(x_MK.bfloat16()).dtype == torch.bfloat16


def test_gpt2s_transposed_linears_give_what_plain_ones_give():
    linear = random_linear()
    conv = Conv1D(7, 12)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    x_MK = torch.randn(3, 12)
    ours = QuantizedLinear.from_linear(conv, *FORMATS[0])
    assert (ours.in_features, ours.out_features) == (12, 7) and ours.bias is conv.bias
    assert torch.equal(ours(x_MK), QuantizedLinear.from_linear(linear, *FORMATS[0])(x_MK))


@pytest.mark.parametrize(("weight", "inputs"), [*FORMATS[:2], (BlockFormat(4), None)], ids=str)
def test_gradients_pass_straight_through_to_input_and_bias(weight, inputs):
    layer = QuantizedLinear.from_linear(random_linear(), weight, inputs)
    x_BTK = torch.randn(2, 3, 12, requires_grad=True)
    upstream = torch.randn(2, 3, 7)
    layer(x_BTK).backward(upstream)
    torch.testing.assert_close(x_BTK.grad, upstream @ layer.dequantized_weight())
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_a_frozen_bias_and_an_input_without_gradients_make_no_graph():
    layer = QuantizedLinear.from_linear(random_linear().requires_grad_(False), *FORMATS[0])
    assert not layer(torch.randn(2, 12)).requires_grad
    without = QuantizedLinear.from_linear(random_linear(bias=False), *FORMATS[0])
    assert without.bias is None and without(torch.randn(2, 12)).shape == (2, 7)
    assert without(torch.randn(0, 12)).shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_dtype_of_the_input_and_the_integers_stay(dtype):
    layer, x_MK = QuantizedLinear.from_linear(random_linear(), *FORMATS[0]), torch.randn(5, 12)
    expected = layer(x_MK.to(dtype).float())
    cast = copy.deepcopy(layer).to(dtype)
    assert cast.weight_factors.dtype == torch.float32 and cast.bias.dtype == dtype
    output = cast(x_MK.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=1e-2, atol=1e-2)


def test_an_engine_computes_where_gradients_are_off_and_goes_when_it_may_be_out_of_date():
    layer = QuantizedLinear.from_linear(random_linear(), *FORMATS[0])
    x_MK = torch.randn(2, 12)
    reference = layer(x_MK).detach()
    layer.engine = lambda x: x.new_full((2, 7), 5.0)
    assert torch.equal(layer(x_MK), reference)
    with torch.no_grad():
        assert layer(x_MK).tolist() == [[5.0] * 7] * 2
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        for other in (
            copy.deepcopy(layer),
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
            copy.deepcopy(layer).double(),
        ):
            assert other.engine is None
            torch.testing.assert_close(other(x_MK), reference)
        # what nn.DataParallel makes on other devices
        assert layer._replicate_for_data_parallel().engine is None
        assert layer.engine is not None
        layer.load_state_dict(layer.state_dict())
        assert layer.engine is None
        assert set(layer.state_dict()) == {"weight_payload", "weight_factors", "bias"}


def test_a_blank_on_the_meta_device_takes_the_state_over_bit_by_bit():
    weight, inputs = FORMATS[1]
    layer = QuantizedLinear.from_linear(random_linear(), weight, inputs)
    blank = QuantizedLinear(12, 7, weight, inputs, device="meta")
    assert all(tensor.is_meta for tensor in blank.state_dict().values())
    blank.load_state_dict(layer.state_dict(), assign=True)
    x_MK = torch.randn(3, 12)
    assert torch.equal(blank(x_MK), layer(x_MK))
    skeleton = QuantizedLinear.from_linear(random_linear().to("meta"), weight, inputs)
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {
        n: t.shape for n, t in layer.state_dict().items()
    }


def test_a_layer_tells_its_costs_and_formats():
    layer = QuantizedLinear.from_linear(random_linear(), *FORMATS[0])
    assert (layer.kept_parameters, layer.flops_per_token) == (84, 168)
    assert layer.storage_bytes == 84 + 7 * 4
    assert "in_features=12, out_features=7, bias=True, weight=BlockFormat(bits=8" in repr(layer)
    assert not hasattr(layer, "weight")


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # what torch.compile does itself
@pytest.mark.parametrize("mode", ["default", "no_grad"])
def test_a_compiled_layer_is_one_graph_and_gives_the_same(mode):
    layer = QuantizedLinear.from_linear(random_linear(), *FORMATS[0])
    x_MK = torch.randn(3, 12)
    with torch.set_grad_enabled(mode == "default"):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x_MK)
        torch.testing.assert_close(compiled, layer(x_MK))
    assert compiled.requires_grad == (mode == "default")


def test_lora_by_peft_learns_on_top():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(QuantizedLinear.from_linear(random_linear(), BlockFormat(4), BlockFormat(8)))
    config = peft.LoraConfig(r=4, target_modules=["0"])
    config._register_custom_module({QuantizedLinear: peft.tuners.lora.Linear})
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        adapted = peft.get_peft_model(model, config)
    x_MK, target = torch.randn(16, 12), torch.randn(16, 7)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (adapted(x_MK) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(AttributeError, match="weight"):
        adapted.merge_and_unload()


def test_other_modules_and_formats_that_do_not_meet_are_refused():
    with pytest.raises(TypeError, match="Conv2d"):
        QuantizedLinear.from_linear(nn.Conv2d(1, 1, 1), BlockFormat())
    with pytest.raises(ValueError, match="factor='shift'"):
        QuantizedLinear(2, 2, BlockFormat(factor="shift"), BlockFormat())
    with pytest.raises(ValueError, match="32 columns wide"):
        check_product_formats(BlockFormat(8, (1, 32)), BlockFormat(8, (1, 64)))
    with pytest.raises(ValueError, match="finite"):
        QuantizedLinear.from_linear(random_linear(), *FORMATS[0])(torch.full((1, 12), torch.nan))
