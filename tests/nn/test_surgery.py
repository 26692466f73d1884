"""Replacing modules by path, and undoing it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.surgery import (
    Ledger,
    dense_weight,
    get_module,
    is_linear,
    linear_shape,
    new_linear,
    replace_module,
    unwrap_adapter,
)


def nested() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 4))


def test_a_missing_path_is_named() -> None:
    with pytest.raises(ValueError, match=r"no module at path '0\.7'"):
        get_module(nested(), "0.7")


def test_replacing_returns_the_old_module_and_carries_the_mode_over() -> None:
    model = nested().eval()
    old, new = model[0][0], nn.Linear(2, 3)
    assert replace_module(model, "0.0", new) is old
    assert model[0][0] is new and not new.training


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


def test_adapters_are_looked_through() -> None:
    wrapper = nn.Module()
    wrapper.base_layer = nn.Linear(2, 2)
    model = nn.Sequential(wrapper, nn.Linear(2, 2))
    assert (unwrap_adapter(model, "0"), unwrap_adapter(model, "1")) == ("0.base_layer", "1")


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
