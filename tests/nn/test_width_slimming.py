"""Gates against cut models in all families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.nn.importance import LayerScores
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from lightning_compress.nn.surgery import Ledger, get_module
from lightning_compress.nn.width_slimming import WidthGates, as_deployed
from lightning_compress.nn.width_surgery import apply_widths
from tests.toys import CLASSIFIERS, tiny_bert

EVERY_FAMILY = pytest.mark.parametrize(("model_type", "class_name"), CLASSIFIERS)


def ids() -> Tensor:
    return torch.randint(2, 40, (3, 7), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids()).logits


def some_masks(gates: WidthGates) -> list[LayerScores]:
    """Keep about half of everything, other structures in each layer."""
    masks = [LayerScores(mask.heads_G.clone(), mask.neurons_F.clone()) for mask in gates.masks]
    for index, mask in enumerate(masks):
        mask.heads_G[index % 2 :: 2] = 0.0
        mask.neurons_F[index % 3 :: 3] = 0.0
    return masks


@EVERY_FAMILY
def test_open_gates_change_nothing(model_type: str, class_name: str, tiny: Any) -> None:
    model = tiny(model_type, class_name)
    before = logits(model)
    gates = WidthGates.install(model, embeddings=True)
    assert gates.is_open and as_deployed(model) is model
    assert torch.equal(logits(model), before)


@EVERY_FAMILY
def test_a_gated_model_computes_what_the_cut_one_does(model_type: str, class_name: str, tiny: Any) -> None:
    model = tiny(model_type, class_name)
    dense = logits(model)
    gates = WidthGates.install(model)
    gates.close(some_masks(gates))
    gated, counted = logits(model), count_parameters(model)
    assert not torch.allclose(gated, dense, atol=1e-5)
    flops = count_flops(model, [5, 3])
    widths = gates.widths
    WidthGates.remove_from(model)
    apply_widths(model, widths, Ledger(model))
    assert torch.allclose(logits(model), gated, atol=1e-5)
    assert count_parameters(model) == counted and count_flops(model, [5, 3]) == flops


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [*CLASSIFIERS, ("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel")],
)
def test_closed_hidden_dimensions_are_cut_ones(model_type: str, class_name: str, tiny: Any) -> None:
    model = tiny(model_type, class_name)
    with torch.no_grad():  # norms that scale and shift each dimension differently
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    dense = logits(model)
    gates = WidthGates.install(model, hidden=True)
    gates.hidden.close((torch.arange(32) % 3 > 0).float())
    gates.close(some_masks(gates))
    gated, counted = logits(model), count_parameters(model)
    assert not torch.allclose(gated, dense, atol=1e-3)
    widths = gates.widths
    WidthGates.remove_from(model)
    apply_widths(model, widths, Ledger(model))
    assert torch.allclose(logits(model), gated, atol=1e-5)
    assert count_parameters(model) == counted


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_projected_embeddings_are_factored_ones_tied_heads_too(class_name: str, tiny: Any) -> None:
    model = tiny("bert", class_name)
    gates = WidthGates.install(model, embeddings=True)
    table = get_module(model, "bert.embeddings.word_embeddings")
    for rank in (20, 12):  # the second step starts from what the first one left
        gates.embeddings.close(table.weight, rank)
    gated, counted = logits(model), count_parameters(model)
    with torch.no_grad():
        table.weight.copy_(gates.embeddings(table.weight))
    widths = gates.widths
    assert widths.embedding_rank == 12
    WidthGates.remove_from(model)
    apply_widths(model, widths, Ledger(model))
    assert torch.allclose(logits(model), gated, atol=1e-5)
    assert count_parameters(model) == counted


def test_gates_stay_in_place_when_another_layer_takes_the_linears_place() -> None:
    model = tiny_bert().eval()
    gates = WidthGates.install(model)
    gates.close(some_masks(gates))
    before, ledger = logits(model), Ledger(model)
    path = "bert.encoder.layer.0.attention.output.dense"
    ledger.replace(path, SoftThresholdLinear(get_module(model, path)))
    assert torch.allclose(logits(model), before, atol=1e-4)
    ledger.revert()
    assert len(get_module(model, path)._forward_pre_hooks) == 1
    WidthGates.remove_from(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_copy_has_gates_of_its_own() -> None:
    model = tiny_bert().eval()
    gates = WidthGates.install(model)
    twin = copy.deepcopy(model)
    before = logits(twin)
    gates.close(some_masks(gates))
    assert torch.equal(logits(twin), before) and not torch.equal(logits(model), before)
    WidthGates.remove_from(twin)
    assert WidthGates.of(twin) is None and WidthGates.of(model) is gates


def test_gates_are_part_of_the_models_state() -> None:
    model, other = tiny_bert(), tiny_bert(seed=4)
    gates = WidthGates.install(model, embeddings=True)
    again = WidthGates.install(other, embeddings=True)
    gates.close(some_masks(gates))
    gates.embeddings.close(model.bert.embeddings.word_embeddings.weight, 10)
    other.load_state_dict(model.state_dict())
    assert again.widths == gates.widths and torch.equal(logits(other), logits(model))


def test_a_model_gets_gates_once() -> None:
    model = tiny_bert()
    WidthGates.install(model)
    with pytest.raises(ValueError, match="has width gates already"):
        WidthGates.install(model)


def test_closed_structures_get_no_gradient() -> None:
    model = tiny_bert()
    gates = WidthGates.install(model)
    gates.close(some_masks(gates))
    model(ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
    layer = model.bert.encoder.layer[0]
    closed = gates.masks[0].neurons_F == 0
    assert closed.any()
    assert not layer.output.dense.weight.grad[:, closed].any()
    assert not layer.intermediate.dense.weight.grad[closed].any()
    assert layer.intermediate.dense.weight.grad[~closed].any()


def test_every_learned_parameter_is_part_of_every_training_pass() -> None:
    model = tiny_bert()
    gates = WidthGates.install(model, neurons=False, learned=True)
    assert len(gates.locations) == 2 and gates.multipliers is not None
    for is_sampled in (False, True):
        model.zero_grad()
        gates.sample(is_sampled)
        model(ids(), labels=torch.tensor([0, 1, 0])).loss.backward()
        assert all(parameter.grad is not None for parameter in gates.parameters())
        assert any(bool(p.grad.any()) for p in gates.locations) == is_sampled
