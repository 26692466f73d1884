"""Modules by path, parameters by name, hooks by place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress.nn.places import (
    carry_hooks,
    get_module,
    names_of,
    remove_hook,
    replace_module,
    staying_hooks,
    tie,
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


def test_adapters_are_looked_through() -> None:
    wrapper = nn.Module()
    wrapper.base_layer = nn.Linear(2, 2)
    model = nn.Sequential(wrapper, nn.Linear(2, 2))
    assert (unwrap_adapter(model, "0"), unwrap_adapter(model, "1")) == ("0.base_layer", "1")


def test_hooks_with_keywords_stay_such_hooks() -> None:
    seen: list[dict] = []

    def gate(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs)

    gate.follows_module = True
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    old.register_forward_pre_hook(gate, with_kwargs=True)
    carry_hooks(old, new)
    new(input=torch.ones(1, 2))
    assert [list(kwargs) for kwargs in seen] == [["input"]] and not old._forward_pre_hooks_with_kwargs


def test_a_hook_is_removed_from_every_module_that_has_it() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []

    def gate(module: nn.Module, args: tuple, *output: object) -> None:
        other.append(module)

    model[0].register_forward_pre_hook(gate)
    model[1].register_forward_hook(gate)
    assert remove_hook(model, gate) == 2 and remove_hook(model, gate) == 0
    model(torch.ones(1, 2))
    assert other == []


def test_a_tied_parameter_has_all_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tie(model, ["2.weight", "0.weight"])
    assert names_of(model, model[0].weight) == ("0.weight", "2.weight") == names_of(model, model[2].weight)
    assert names_of(model, model[1].weight) == ("1.weight",) and names_of(model, None) == ()


def test_hooks_that_follow_are_left_out_of_a_memo_and_others_shared() -> None:
    def stays(module: nn.Module, args: tuple) -> None: ...

    def follows(module: nn.Module, args: tuple) -> None: ...

    follows.follows_module = True
    linear = nn.Linear(2, 2)
    for hook in (stays, follows):
        linear.register_forward_pre_hook(hook)
    twin = copy.deepcopy(linear, staying_hooks(linear))
    assert list(twin._forward_pre_hooks.values()) == [stays]
    assert list(linear._forward_pre_hooks.values()) == [stays, follows]
