from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.nn.block_quantization import QuantizationGate, QuantizationGates
from lightning_compress.nn.operator_formats import OperatorFormats, preset
from lightning_compress.nn.quantization_plan import quantize_model
from lightning_compress.nn.surgery import Ledger, get_module
from lightning_compress.nn.width_slimming import WidthGates
from lightning_compress.nn.width_surgery import apply_widths
from tests.toys import tiny_bert

IDS = torch.tensor([[2, 5, 6, 7], [2, 8, 9, 3]])
CLASSES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
}
EVERYTHING = preset("w8a8", operators="all")
LAYERS = ("linear", "attention", "softmax", "activation", "norm")


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


def gates_in(model: nn.Module) -> list[QuantizationGate]:
    found = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in found if isinstance(hook, QuantizationGate)]


def installed(
    model: nn.Module, formats: OperatorFormats, strength: float = 1.0
) -> tuple[Ledger, QuantizationGates]:
    ledger = Ledger(model)
    gates = QuantizationGates.install(ledger, formats)
    gates.ramp.set(strength)
    return ledger, gates


def formats_for(family: str) -> OperatorFormats:
    """Everything that the family has modules for."""
    operators = list(LAYERS)
    if family == "llama":
        operators.remove("activation")
    return preset(
        "w4a8", (2, 8), "shift", operators if family in ("gpt2", "llama") else [*operators, "embedding"]
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("family", CLASSES)
def test_a_gated_model_answers_as_it_will_quantised_bit_for_bit(family: str, tiny) -> None:
    model, formats = tiny(family, CLASSES[family]), formats_for(family)
    before = answer(model)
    ledger, gates = installed(model, formats, strength=0.0)
    assert torch.allclose(answer(model), before, atol=1e-6)
    gates.ramp.set(1.0)
    gated = answer(model)
    ledger.revert()
    assert torch.equal(answer(model), before) and gates_in(model) == []
    quantize_model(model, formats)
    assert torch.equal(answer(model), gated) and not torch.equal(gated, before)


def test_gates_change_no_name_no_parameter_and_no_module() -> None:
    model = tiny_bert()
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    parameters = list(map(id, model.parameters()))
    installed(model, EVERYTHING)
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == kinds
    assert list(map(id, model.parameters())) == parameters


def test_every_parameter_learns_while_everything_is_rounded() -> None:
    model = tiny_bert().train()
    installed(model, EVERYTHING)
    model(IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []


def test_half_of_the_strength_is_closer_to_the_model() -> None:
    model = tiny_bert()
    before = answer(model)
    _, gates = installed(model, preset("w4a4"))
    full = float((answer(model) - before).abs().max())
    gates.ramp.set(0.5)
    assert 0.0 < float((answer(model) - before).abs().max()) < full


def test_places_are_looked_for_without_hooks_where_nothing_is_trained() -> None:
    model = tiny_bert()
    ledger = Ledger(model)
    gates = QuantizationGates.install(ledger, EVERYTHING, is_trained=False)
    assert gates_in(model) == [] and len(ledger) == 0 and len(gates.places["linears"]) == 12
    with pytest.raises(ValueError, match="match nothing"):
        QuantizationGates.install(ledger, EVERYTHING, ["*.conv"], is_trained=False)


def test_a_copy_has_gates_and_a_strength_of_its_own() -> None:
    model = tiny_bert()
    _, gates = installed(model, EVERYTHING)
    twin = copy.deepcopy(model)
    expected = answer(model)
    gates.ramp.set(0.0)
    assert torch.equal(answer(twin), expected) and not torch.equal(answer(model), expected)
    QuantizationGates.remove_from(twin)
    assert gates_in(twin) == [] and len(gates_in(model)) > 0
    assert torch.allclose(answer(twin), answer(model), atol=1e-6)


def test_gates_stay_in_their_places_when_modules_are_exchanged() -> None:
    model = tiny_bert()
    installed(model, preset("w8a8"))
    path, ledger = "bert.encoder.layer.0.output.dense", Ledger(model)
    new = copy.deepcopy(get_module(model, path))
    new._forward_hooks.clear()
    before = answer(model)
    ledger.replace(path, new)
    assert len(new._forward_hooks) == 1 and torch.equal(answer(model), before)


@pytest.mark.parametrize("block", [(1, 0), (1, 4), (4, 4)])
def test_closed_widths_are_rounded_as_if_they_were_gone(block: tuple[int, int]) -> None:
    model = tiny_bert()
    widths = WidthGates.install(model, embeddings=True, hidden=True)
    formats = preset("w8a8", block, operators="all")
    ledger, gates = installed(model, formats)
    gates.follow(model, widths)
    whole = answer(model)
    for heads, neurons in zip(widths.heads, widths.neurons, strict=True):
        heads.close(torch.tensor([1.0, 0.0, 1.0, 0.0]))  # type: ignore[operator]
        neurons.close((torch.arange(64) % 3 > 0).float())  # type: ignore[operator]
    assert widths.hidden is not None and widths.embeddings is not None
    widths.hidden.close((torch.arange(32) % 4 > 0).float())
    table = get_module(model, "bert.embeddings.word_embeddings")
    widths.embeddings.close(table.weight, 9)  # type: ignore[arg-type]
    gated = answer(model)
    assert not torch.allclose(gated, whole, atol=1e-4)
    ledger.revert()
    with torch.no_grad():
        table.weight.copy_(widths.embeddings(table.weight))  # type: ignore[operator, union-attr]
    kept = widths.widths
    WidthGates.remove_from(model)
    apply_widths(model, kept, Ledger(model))
    quantize_model(model, formats)
    assert torch.allclose(answer(model), gated, atol=1e-5)
