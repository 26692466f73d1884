"""Adapters: what LoRA adds to a weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.adapters import (
    adapter_around,
    adapter_factors,
    adapter_rank,
    check_foldable,
    fold_adapter,
    without_adapter,
)
from lightning_compress.nn.surgery import Ledger


class Lora(nn.Module):
    """The parts of peft's wrapper, without peft."""

    def __init__(self, base_layer: nn.Linear, **ranks: int) -> None:
        super().__init__()
        inputs, outputs = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({n: nn.Linear(inputs, r, bias=False) for n, r in ranks.items()})
        self.lora_B = nn.ModuleDict({n: nn.Linear(r, outputs, bias=False) for n, r in ranks.items()})
        self.scaling = {name: 0.5 * (place + 1) for place, name in enumerate(ranks)}
        self.active_adapters, self.merged, self.disable_adapters = list(ranks), False, False


def test_the_factors_multiply_to_what_the_active_adapters_add() -> None:
    torch.manual_seed(0)
    adapter = Lora(nn.Linear(5, 3), one=2, other=1, idle=4)
    adapter.active_adapters = ["one", "other"]
    up_OR, down_RI = adapter_factors(adapter, adapter.base_layer.weight)
    expected = 0.5 * adapter.lora_B["one"].weight @ adapter.lora_A["one"].weight
    expected = expected + 1.0 * adapter.lora_B["other"].weight @ adapter.lora_A["other"].weight
    assert adapter_rank(adapter) == up_OR.shape[1] == down_RI.shape[0] == 3
    assert torch.allclose(up_OR @ down_RI, expected)


def test_the_factors_take_the_dtype_of_the_weight() -> None:
    adapter = Lora(nn.Linear(5, 3).bfloat16(), one=2)
    assert {factor.dtype for factor in adapter_factors(adapter, adapter.base_layer.weight)} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("switch", ["merged", "disable_adapters"])
def test_an_idle_adapter_adds_nothing(switch: str) -> None:
    adapter = Lora(nn.Linear(5, 3), one=2)
    setattr(adapter, switch, True)
    assert adapter_rank(adapter) == 0
    assert adapter_factors(adapter, adapter.base_layer.weight)[0].shape == (3, 0)


def test_no_adapter_has_rank_zero() -> None:
    up_OR, down_RI = adapter_factors(None, torch.ones(3, 5))
    assert (up_OR @ down_RI).abs().sum() == 0
    assert adapter_rank(None) == 0


def test_an_adapter_is_found_around_its_own_linear_only() -> None:
    model = nn.ModuleDict({"query": Lora(nn.Linear(2, 2), one=1), "key": nn.Linear(2, 2)})
    assert adapter_around(model, "query.base_layer") is model["query"]
    assert adapter_around(model, "key") is None
    assert (without_adapter("query.base_layer"), without_adapter("key")) == ("query", "key")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"lora_A": None}, "is not LoRA"),
        ({"lora_magnitude_vector": {"default": 1}}, "DoRA"),
        ({"lora_variant": {"default": object()}}, "variant"),
        ({"lora_bias": {"default": True}}, "bias"),
        ({"merged": True}, "unmerge_adapter"),
    ],
)
def test_what_is_no_plain_product_is_refused(parts: dict[str, Any], reason: str) -> None:
    adapter = SimpleNamespace(**{"lora_A": nn.ModuleDict(), **parts})
    with pytest.raises(ValueError, match=reason):
        check_foldable("layer.0.query.base_layer", adapter)


def test_plain_lora_is_accepted() -> None:
    check_foldable("query.base_layer", Lora(nn.Linear(2, 2), one=1))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_folded_adapter_leaves_the_linear_with_what_it_added(is_transposed: bool) -> None:
    torch.manual_seed(0)
    linear: Any = nn.Linear(5, 3)
    if is_transposed:
        dense, linear = linear, Conv1D(3, 5)
        linear.weight.data, linear.bias.data = dense.weight.data.T.clone(), dense.bias.data
    adapter: Any = Lora(nn.Linear(5, 3), one=2)
    adapter.base_layer = linear
    model, x = nn.Sequential(adapter), torch.randn(2, 5)
    expected = linear(x) + 0.5 * adapter.lora_B["one"](adapter.lora_A["one"](x))
    ledger = Ledger(model)
    assert fold_adapter(ledger, "0") and model[0] is linear
    assert torch.allclose(linear(x), expected, atol=1e-6)
    assert not fold_adapter(ledger, "0")
    ledger.revert()
    assert isinstance(model[0], Lora)
