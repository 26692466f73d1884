from __future__ import annotations

import pytest
import torch

from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig
from lightning_compress.methods.soft_threshold_rank import convert as convert_ranks
from lightning_compress.methods.soft_threshold_rank import prepare as prepare_ranks
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.factored_embedding import factor_embedding
from lightning_compress.nn.operator_formats import preset
from lightning_compress.nn.quantized_places import find_places
from lightning_compress.nn.rounded_places import Features, features_of, left_out, places_in_training
from lightning_compress.nn.surgery import get_module, linear_shape
from lightning_compress.nn.width_gate import StructureGate
from lightning_compress.nn.width_slimming import WidthGates
from tests.toys import tiny_bert

FORMATS = preset("w8a8", operators="all")


def ranks(model: torch.nn.Module):
    return prepare_ranks(model, SoftThresholdRankConfig(target_params=0.5, rank_multiple=4))


def test_places_of_layers_in_training_are_those_of_the_dense_model() -> None:
    model = tiny_bert()
    dense = find_places(model, FORMATS)
    assert places_in_training(model, FORMATS) == dense
    ranks(model)
    assert places_in_training(model, FORMATS) == dense
    with pytest.raises(ValueError, match="match nothing"):
        places_in_training(model, FORMATS, ["*.conv"])


def test_weights_that_are_not_finite_are_found_before_training() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[1].intermediate.dense.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.1\.intermediate\.dense holds NaN"):
        places_in_training(model, FORMATS)
    assert len(places_in_training(model, FORMATS, ["*.1.intermediate.dense"])["linears"]) == 11


def test_looking_for_places_leaves_the_model_alone() -> None:
    model = tiny_bert()
    before = {name: (id(t), t.device) for name, t in model.state_dict(keep_vars=True).items()}
    places_in_training(model, FORMATS)
    assert {name: (id(t), t.device) for name, t in model.state_dict(keep_vars=True).items()} == before


def test_what_was_excluded_stays_so_in_parts() -> None:
    model = tiny_bert()
    exclude = ["*.layer.0.*query", "*.position_embeddings", "*.word_embeddings"]
    handle = ranks(model)
    places = places_in_training(model, FORMATS, exclude)
    convert_ranks(handle)
    factor_embedding(model, 4)
    first = "bert.encoder.layer.0.attention.self.query"
    assert sorted(left_out(model, FORMATS, places)) == [
        "bert.embeddings.position_embeddings",
        "bert.embeddings.word_embeddings.projection",
        "bert.embeddings.word_embeddings.table",
        f"{first}.down",
        f"{first}.up",
    ]
    everything = places_in_training(tiny_bert(), FORMATS)
    assert left_out(model, FORMATS, everything) == []


@pytest.mark.parametrize("operators", [("linear", "attention"), ("linear", "softmax"), "all"])
@pytest.mark.parametrize("exclude", [["*.query", "*.value"], ["*.intermediate.dense"]])
def test_what_lies_below_a_place_that_cannot_split_is_no_part_of_it(operators, exclude) -> None:
    model, formats = tiny_bert(), preset("w8a8", operators=operators)
    places = places_in_training(model, formats, exclude)
    whole = places_in_training(model, formats)
    excluded = sorted(set(whole["linears"]) - set(places["linears"]))
    assert len(excluded) == 2 * len(exclude)
    assert sorted(left_out(model, formats, places)) == excluded


def test_features_stand_for_structures_and_are_looked_up_again_when_gates_close() -> None:
    gate = StructureGate(3, width=2)
    features = Features(gate, width=2, copies=2)
    assert features.kept() is None
    gate.close(torch.tensor([0.0, 1.0, 1.0]))
    kept = features.kept()
    assert kept is not None and kept.tolist() == [2, 3, 4, 5, 8, 9, 10, 11] and features.kept() is kept
    gate.close(torch.tensor([0.0, 0.0, 1.0]))
    kept = features.kept()
    assert kept is not None and kept.tolist() == [4, 5, 10, 11]


def test_indices_first_asked_for_in_inference_serve_training() -> None:
    gate = StructureGate(3, width=1)
    gate.close(torch.tensor([0.0, 1.0, 1.0]))
    features = Features(gate)
    with torch.inference_mode():
        features.kept()
    x = torch.ones(2, 3, requires_grad=True)
    kept = features.kept()
    assert kept is not None and not kept.is_inference()
    x.index_select(1, kept).sum().backward()


def test_gates_whose_state_is_drawn_close_nothing_for_good() -> None:
    gate = StructureGate(3, width=1, learned=True)
    gate.close(torch.tensor([0.0, 1.0, 1.0]))
    gate.is_sampled = True
    assert Features(gate).kept() is None


def test_every_linear_counts_what_surgery_will_leave_of_it() -> None:
    model = tiny_bert()
    gates = WidthGates.install(model, hidden=True)
    for heads, neurons in zip(gates.heads, gates.neurons, strict=True):
        heads.close(torch.tensor([1.0, 0.0, 0.0, 1.0]))  # type: ignore[operator]
        neurons.close((torch.arange(64) % 4 > 0).float())  # type: ignore[operator]
    assert gates.hidden is not None
    gates.hidden.close((torch.arange(32) < 20).float())
    found = features_of(model, gates)

    def counts(path: str) -> list[int | None]:
        kept = [None if part is None else part.kept() for part in found[path]]
        return [None if index is None else len(index) for index in kept]

    expected = {"query": [20, 16], "key": [20, 16], "value": [20, 16], "attention_output": [16, 20]}
    expected |= {"ffn_in": [20, 48], "ffn_out": [48, 20]}
    for slot in describe(model).linears:
        assert counts(slot.path) == expected[slot.role], slot.role
        inputs, outputs = linear_shape(get_module(model, slot.path))
        limits = zip(found[slot.path], (inputs, outputs), strict=True)
        assert all(int(part.kept().max()) < size for part, size in limits)  # type: ignore[union-attr]
    for path in ("bert.embeddings.LayerNorm", "bert.encoder.layer.0.output.LayerNorm"):
        assert counts(path) == [None, 20]
    assert counts("bert.encoder.layer.1.intermediate.intermediate_act_fn") == [None, 48]
