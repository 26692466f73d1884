"""Importance scores, against the official formula worked by hand and a slow reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.importance import (
    ImportanceMeter,
    group_taylor,
    input_factor,
    output_factor,
    taylor,
)
from lightning_compress.nn.soft_threshold_rank import SoftThresholdLinear
from lightning_compress.nn.surgery import dense_weight, get_module, replace_module
from tests.toys import ToyTexts, tiny_bert

FAMILIES = {
    "bert": "BertForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
}


def batches(count: int) -> list[dict[str, Tensor]]:
    rows = [ToyTexts()[i] for i in range(4 * count)]
    return [
        {name: torch.stack([row[name] for row in rows[4 * i : 4 * i + 4]]) for name in rows[0]}
        for i in range(count)
    ]


def official_scores(
    model: nn.Module, gradients: list[dict[str, Tensor]]
) -> list[tuple[list[float], list[float]]]:
    """``|W * sum_k |g_k||`` element by element, and sums over what belongs to a head or a neuron, in plain loops."""
    found = []
    for layer in describe(model).layers:
        paths = {slot.role: slot.path for slot in layer.linears}

        def scores_OI(role: str, paths: dict[Any, str] = paths) -> Tensor:
            linear = get_module(model, paths[role])
            total = sum(gradient[f"{paths[role]}.weight"].abs() for gradient in gradients)
            total_OI = total if dense_weight(linear) is linear.weight else total.T
            return (dense_weight(linear) * total_OI).abs().detach()

        output_OI, out_OF = scores_OI("attention_output"), scores_OI("ffn_out")
        width = output_OI.shape[1] // layer.num_key_value_heads
        heads = [
            sum(
                float(output_OI[o, head * width + i]) for o in range(output_OI.shape[0]) for i in range(width)
            )
            for head in range(layer.num_key_value_heads)
        ]
        rows = [scores_OI(role) for role in ("ffn_in", "ffn_gate") if role in paths]
        neurons = [
            sum(float(value) for value in out_OF[:, f]) + sum(float(v) for row in rows for v in row[f])
            for f in range(layer.intermediate_size)
        ]
        found.append((heads, neurons))
    return found


def test_the_formulas_on_numbers_worked_by_hand() -> None:
    weight, gradient = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[2.0, 1.0], [-1.0, 5.0]])
    assert taylor(weight, gradient).tolist() == [4.0, 3.0]
    assert group_taylor(weight, gradient).tolist() == [0.0, 3.0]


@pytest.mark.parametrize(("model_type", "class_name"), FAMILIES.items())
def test_scores_of_a_pass_are_the_official_formula(model_type: str, class_name: str, tiny: Any) -> None:
    model = tiny(model_type, class_name)
    meter, gradients = ImportanceMeter(model), []
    ids = torch.randint(2, 50, (3, 4, 7))
    for batch in ids:
        model.zero_grad()
        model(batch, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        meter.add()
    for layer, (heads, neurons) in zip(meter.layers, official_scores(model, gradients), strict=True):
        assert layer.heads_G.tolist() == pytest.approx(heads, rel=1e-4)
        assert layer.neurons_F.tolist() == pytest.approx(neurons, rel=1e-4)


def test_heads_that_share_keys_are_scored_together(tiny: Any) -> None:
    model = tiny("llama", "LlamaForSequenceClassification")
    assert [len(layer.heads_G) for layer in ImportanceMeter(model).layers] == [2, 2]


def test_steps_with_moving_weights_add_up() -> None:
    model = tiny_bert()
    meter, expected = ImportanceMeter(model), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for batch in batches(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        meter.add()
        weight = get_module(model, describe(model).layers[0].linears[3].path).weight
        step = (weight * weight.grad).abs().detach().sum(0).view(4, 8).sum(1)
        expected = step if expected is None else expected + step
        optimizer.step()
    assert meter.num_passes == 3
    assert torch.allclose(meter.layers[0].heads_G, expected)


def test_group_taylor_is_the_gradient_of_a_gate() -> None:
    model, (batch,) = tiny_bert().eval(), batches(1)
    gates = {}
    for layer in describe(model).layers:
        for slot in layer.linears:
            if slot.role in ("attention_output", "ffn_out"):
                linear = get_module(model, slot.path)
                gate = torch.ones(linear.in_features, requires_grad=True)
                linear.register_forward_pre_hook(lambda module, args, gate=gate: (args[0] * gate,))
                gates[layer.index, slot.role] = gate
    meter = ImportanceMeter(model, "group_taylor")
    model(**batch).loss.backward()
    meter.add()
    for index, layer in enumerate(meter.layers):
        heads, neurons = gates[index, "attention_output"].grad, gates[index, "ffn_out"].grad
        assert torch.allclose(layer.heads_G, heads.view(4, 8).sum(1).abs(), rtol=1e-3, atol=1e-8)
        assert torch.allclose(layer.neurons_F, neurons.abs(), rtol=1e-3, atol=1e-8)


def test_hidden_dimensions_are_scored_by_all_that_reads_and_writes_them() -> None:
    model, (batch,) = tiny_bert(), batches(1)
    meter = ImportanceMeter(model, hidden=True)
    model(**batch).loss.backward()
    meter.add()
    expected = torch.zeros(32)
    for slot in describe(model).linears:
        weight = get_module(model, slot.path).weight
        score = (weight * weight.grad).abs().detach()
        expected += score.sum(1) if slot.role in ("attention_output", "ffn_out") else score.sum(0)
    assert meter.hidden_D is not None and torch.allclose(meter.hidden_D, expected, rtol=1e-4)
    assert len(meter.parameters()) == len(describe(model).linears)


def test_a_gradient_that_overflowed_counts_as_none() -> None:
    model, (first,) = tiny_bert(), batches(1)
    meter, reference = ImportanceMeter(model), ImportanceMeter(model)
    model(**first).loss.backward()
    meter.add()
    reference.add()
    meter.add(lambda parameter: torch.full_like(parameter, float("inf")))
    meter.add(lambda parameter: torch.full_like(parameter, float("nan")))
    for layer, expected in zip(meter.layers, reference.layers, strict=True):
        assert torch.equal(layer.heads_G, expected.heads_G) and torch.equal(
            layer.neurons_F, expected.neurons_F
        )


def test_parameters_without_gradients_count_as_none() -> None:
    meter = ImportanceMeter(tiny_bert())
    meter.add()
    assert meter.num_passes == 1 and not any(layer.heads_G.any() for layer in meter.layers)


def test_without_gradients_the_size_of_weights_is_added() -> None:
    model = tiny_bert()
    meter = ImportanceMeter(model)
    meter.add_sizes()
    weight = get_module(model, describe(model).layers[1].linears[3].path).weight
    assert torch.allclose(meter.layers[1].heads_G, weight.detach().abs().sum(0).view(4, 8).sum(1))
    assert meter.num_passes == 0


def test_the_state_survives_a_round_trip() -> None:
    model, (batch,) = tiny_bert(), batches(1)
    meter = ImportanceMeter(model, hidden=True)
    model(**batch).loss.backward()
    meter.add()
    again = ImportanceMeter(tiny_bert(seed=3), hidden=True)
    again.load_state_dict(meter.state_dict())
    assert again.num_passes == 1
    for layer, expected in zip(again.layers, meter.layers, strict=True):
        assert torch.equal(layer.heads_G, expected.heads_G) and torch.equal(
            layer.neurons_F, expected.neurons_F
        )
    assert torch.equal(again.hidden_D, meter.hidden_D)
    again.reset()
    assert again.num_passes == 0 and not again.layers[0].neurons_F.any()


def test_factorised_linears_are_scored_by_the_factor_that_loses_columns_or_rows() -> None:
    model, (batch,) = tiny_bert(), batches(1)
    layer = describe(model).layers[0]
    for slot in layer.linears:
        replace_module(model, slot.path, SoftThresholdLinear(get_module(model, slot.path)))
    meter = ImportanceMeter(model, "group_taylor")
    model(**batch).loss.backward()
    meter.add()
    dense = tiny_bert()
    reference = ImportanceMeter(dense, "group_taylor")
    dense(**batch).loss.backward()
    reference.add()
    # a group of inputs is worth the same however the weight is written
    assert torch.allclose(meter.layers[0].heads_G, reference.layers[0].heads_G, rtol=1e-2, atol=1e-6)


def test_what_holds_no_weights_is_refused() -> None:
    for factor in (input_factor, output_factor):
        with pytest.raises(TypeError, match="no form that importance can be read from"):
            factor(nn.GELU())
