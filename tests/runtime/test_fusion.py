import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.runtime.fusion import FusedLinears, is_plain


def three(bias: bool = True, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(4, size, bias=bias, dtype=dtype) for size in (3, 2, 5)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_one_product_gives_what_the_linears_give(bias, context):
    linears, inputs = three(bias), torch.randn(6, 4, dtype=torch.float64)
    expected = torch.cat([linear(inputs) for linear in linears], dim=1)
    with context():
        fused = FusedLinears().of(linears)
        assert fused is not None
        assert fused.sizes == (3, 2, 5)
        torch.testing.assert_close(nn.functional.linear(inputs, fused.weight_SD, fused.bias_S), expected)
        torch.testing.assert_close(torch.cat([linear(inputs) for linear in linears], dim=1), expected)


def test_parameters_stay_the_same_objects_and_share_one_storage():
    linears = three()
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    with torch.no_grad():
        fused = FusedLinears().of(linears)
    assert fused is not None
    assert parameters == [parameter for linear in linears for parameter in linear.parameters()]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)
    storage = fused.weight_SD.untyped_storage().data_ptr()
    assert {linear.weight.untyped_storage().data_ptr() for linear in linears} == {storage}


def test_updates_in_place_reach_the_fused_form():
    linears, keeper = three(), FusedLinears()
    with torch.no_grad():
        fused = keeper.of(linears)
        optimizer = torch.optim.AdamW([p for linear in linears for p in linear.parameters()], lr=0.1)
    nn.Sequential(linears[0])(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    before = linears[0].weight.clone()
    optimizer.step()
    linears[2].load_state_dict({name: value + 1 for name, value in linears[2].state_dict().items()})
    with torch.no_grad():
        assert keeper.of(linears) is fused
    assert not torch.equal(before, linears[0].weight)
    assert torch.equal(fused.weight_SD, torch.cat([linear.weight for linear in linears]))
    assert torch.equal(fused.bias_S, torch.cat([linear.bias for linear in linears]))


def test_casting_and_replacing_weights_makes_the_form_anew():
    linears, keeper = three(), FusedLinears()
    with torch.no_grad():
        keeper.of(linears)
        for linear in linears:
            linear.to(torch.float32)
        cast = keeper.of(linears)
        assert cast is not None and cast.weight_SD.dtype == torch.float32
        linears[1].weight = nn.Parameter(torch.full((2, 4), 3.0))
        again = keeper.of(linears)
    assert again is not None
    assert again.weight_SD[3:5].unique().tolist() == [3.0]


def test_a_bias_that_goes_missing_ends_the_fused_form():
    linears, keeper = three(), FusedLinears()
    with torch.no_grad():
        assert keeper.of(linears) is not None
        linears[1].bias = None
        assert keeper.of(linears) is None


def test_linears_run_on_their_own_where_gradients_of_their_weights_are_wanted():
    linears, keeper = three(), FusedLinears()
    assert keeper.of(linears) is None
    for linear in linears:
        linear.requires_grad_(False)
    assert keeper.of(linears) is not None


def mixed_bias(linears):
    linears[1] = nn.Linear(4, 2, bias=False, dtype=torch.float64)


def mixed_bias_first(linears):
    linears[0] = nn.Linear(4, 3, bias=False, dtype=torch.float64)


def hooked(linears):
    linears[1].register_forward_hook(lambda *args: None)


def subclassed(linears):
    linears[1] = type("Mine", (nn.Linear,), {})(4, 2, dtype=torch.float64)


def parametrised(linears):
    parametrizations.orthogonal(linears[1])


def patched(linears):
    linears[1].forward = lambda rows: rows


def half_cast(linears):
    linears[1].float()


def shared(linears):
    linears[1].share_memory()


@pytest.mark.parametrize(
    "change", [mixed_bias, mixed_bias_first, hooked, subclassed, parametrised, patched, half_cast, shared]
)
def test_what_is_not_plain_or_not_alike_runs_on_its_own(change):
    linears = three()
    change(linears)
    addresses = [parameter.data_ptr() for linear in linears for parameter in linear.parameters()]
    with torch.no_grad():
        assert FusedLinears().of(linears) is None
    assert addresses == [parameter.data_ptr() for linear in linears for parameter in linear.parameters()]


def test_weights_born_under_inference_mode_are_left_alone():
    with torch.inference_mode():
        linears = three()
        assert FusedLinears().of(linears) is None


def test_copies_and_pickles_leave_the_fused_form_out():
    linears, keeper = three(), FusedLinears()
    with torch.no_grad():
        keeper.of(linears)
        twin_linears, twin = copy.deepcopy((linears, keeper))
        assert twin._fused is None
        fused = twin.of(twin_linears)
        twin_linears[0].weight.zero_()
    assert fused.weight_SD[:3].abs().max() == 0
    assert linears[0].weight.abs().min() > 0
    assert pickle.loads(pickle.dumps(keeper))._fused is None


def test_only_exactly_linear_modules_without_hooks_are_plain():
    assert is_plain(nn.Linear(2, 2))
    assert not is_plain(nn.Identity())
