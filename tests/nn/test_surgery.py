"""Replacing modules by path, and undoing it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.surgery import (
    Ledger,
    dense_weight,
    is_linear,
    linear_shape,
    names_of,
    new_linear,
    remove_hook,
    successors_of,
    tie,
)


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 4))


def test_conv1d_is_a_transposed_linear() -> None:
    conv, x = Conv1D(5, 3), torch.randn(4, 3)
    assert linear_shape(conv) == (3, 5) and is_linear(conv)
    assert torch.allclose(x @ dense_weight(conv).T + conv.bias, conv(x), atol=1e-6)


def test_what_is_not_linear_is_refused() -> None:
    assert not is_linear(nn.ReLU())
    with pytest.raises(TypeError, match="ReLU is not a linear layer"):
        linear_shape(nn.ReLU())


def test_a_new_linear_follows_dtype_and_device() -> None:
    like = nn.Linear(2, 2, dtype=torch.float64, device="meta")
    made = new_linear(like, 3, 4, bias=False)
    assert made.weight.shape == (4, 3) and made.weight.dtype == torch.float64 and made.weight.is_meta
    assert made.bias is None


def test_a_stale_parameter_knows_its_successors_and_a_reused_bias_is_not_stale() -> None:
    model = nested()
    old = model[1]
    new = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 4))
    new[1].bias = old.bias
    ledger = Ledger(model)
    ledger.replace("1", new)
    assert ledger.successors() == {id(old.weight): [new[0].weight, new[1].weight]}


def test_a_tied_parameter_that_lives_elsewhere_is_not_stale() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ledger = Ledger(model)
    ledger.replace("1", nn.Linear(3, 3, bias=False))
    assert ledger.successors() == {}


def test_forgetting_keeps_the_way_back() -> None:
    model = nested()
    ledger = Ledger(model)
    ledger.replace("1", nn.Linear(3, 9))
    ledger.forget_stale()
    assert ledger.successors() == {}
    ledger.revert()
    assert linear_shape(model[1]) == (3, 4)


def test_reverting_undoes_nested_replacements_last_first_with_zero_weights() -> None:
    model = nested()
    model[0][0].weight.requires_grad_(False)
    ledger = Ledger(model)
    ledger.replace("0.0", nn.Linear(2, 7))
    ledger.replace("0", nn.Identity())
    assert len(ledger) == 2
    ledger.revert()
    assert len(ledger) == 0
    assert linear_shape(model[0][0]) == (2, 3)
    assert not model[0][0].weight.requires_grad and model[0][0].bias.requires_grad
    assert not model[0][0].weight.is_meta and bool((model[0][0].weight == 0).all())


def test_what_took_the_place_of_a_module_may_have_no_parameters_to_tell_dtype_and_device() -> None:
    model = nested().to(torch.bfloat16)
    ledger = Ledger(model)
    ledger.replace("1", nn.Identity())
    ledger.revert()
    assert model[1].weight.dtype == torch.bfloat16


def test_parameters_of_a_reverted_replacement_have_heirs_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    ledger = Ledger(model)
    between = nn.Linear(2, 3)
    ledger.replace("0", between)
    ledger.revert()
    ledger.inherit("0", between.parameters())
    heirs = list(model.parameters())
    assert [list(map(id, found)) for found in ledger.successors().values()] == [list(map(id, heirs))] * 2
    ledger.forget_stale()
    assert ledger.successors() == {}


class Gate:
    """A hook that belongs to a place."""

    follows_module = True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: tuple, *more: object) -> object:
        return self.factor * more[0] if more else (self.factor * args[0],)


def test_hooks_that_follow_stay_in_place_through_replacement_and_revert() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.randn(3, 2)
    model[0].register_forward_pre_hook(Gate(2.0))
    model[0].register_forward_hook(Gate(3.0))
    ledger, between = Ledger(model), nn.Linear(2, 2)
    old = ledger.replace("0", between)
    assert torch.allclose(model(x), 3 * nn.functional.linear(2 * x, between.weight, between.bias))
    assert not old._forward_pre_hooks and not old._forward_hooks
    ledger.revert()
    with torch.no_grad():
        model[0].bias.fill_(1.0)
    assert torch.equal(model(x), torch.full((3, 2), 3.0))
    assert not between._forward_pre_hooks and not between._forward_hooks


def test_other_hooks_stay_with_their_module_and_come_back_with_the_blank() -> None:
    model, calls = nn.Sequential(nn.Linear(2, 2)), []
    model[0].register_forward_hook(lambda module, args, output: calls.append(module))
    ledger = Ledger(model)
    ledger.replace("0", nn.Linear(2, 2))
    model(torch.ones(1, 2))
    assert calls == []
    ledger.revert()
    model(torch.ones(1, 2))
    assert calls == [model[0]]


def test_a_hook_is_removed_wherever_it_went() -> None:
    model, gate = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), Gate(0.0)
    model[0].register_forward_pre_hook(gate)
    model[1].register_forward_hook(gate)
    Ledger(model).replace("0", nn.Linear(2, 2))
    assert remove_hook(model, gate) == 2 and remove_hook(model, gate) == 0
    assert bool((model(torch.ones(1, 2)) != 0).any())


def test_what_is_altered_in_place_comes_back_in_its_old_shape() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    linear, weight, bias = model[0], model[0].weight, model[0].bias

    def halve(module: nn.Module) -> None:
        module.weight = nn.Parameter(module.weight.detach()[:, :1])

    ledger = Ledger(model)
    ledger.alter("0", halve)
    assert model[0] is linear and model[0].bias is bias
    assert ledger.successors() == {id(weight): [linear.weight]}
    ledger.revert()
    assert model[0].weight.shape == (3, 2) and linear_shape(model[0]) == (2, 3)


def test_attributes_are_given_back() -> None:
    model = nn.Sequential(nn.Dropout(0.1))
    ledger = Ledger(model)
    ledger.set_attributes("0", p=0.5)
    ledger.set_attributes("0", p=0.7)
    assert model[0].p == 0.7
    ledger.forget_stale()
    ledger.revert()
    assert model[0].p == 0.1
    with pytest.raises(AttributeError):
        ledger.set_attributes("0", heads=3)


def test_ties_can_be_made_again_when_all_else_is_reverted() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tie(model, ["0.weight", "1.weight"])
    ledger = Ledger(model)
    ledger.on_revert(lambda root: tie(root, ["0.weight", "1.weight"]))
    for path in ("0", "1"):
        ledger.replace(path, nn.Linear(3, 2))
    assert names_of(model, model[0].weight) == ("0.weight",)
    ledger.revert()
    assert names_of(model, model[0].weight) == ("0.weight", "1.weight")


def test_heirs_that_were_replaced_in_turn_are_followed_to_the_end() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    first, second, third = nn.Linear(2, 3, bias=False), nn.Linear(2, 4, bias=False), nn.Linear(2, 5)
    dense, one, two = model[0].weight, Ledger(model), Ledger(model)
    one.replace("0", first)
    one.replace("0", second)
    assert one.successors() == {id(dense): [second.weight], id(first.weight): [second.weight]}
    two.replace("0", third)
    heirs = [third.weight, third.bias]
    assert successors_of([one, two]) == dict.fromkeys(map(id, (dense, first.weight, second.weight)), heirs)


def test_replacing_to_and_fro_ends() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    there, back, ledger = nn.Linear(2, 2, bias=False), model[0], Ledger(model)
    for module in (there, back, nn.Linear(2, 1, bias=False)):
        ledger.replace("0", module)
    assert ledger.successors()[id(back.weight)] == [model[0].weight]
