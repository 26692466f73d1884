import pytest
import torch
from torch import nn

from lightning_compress.nn.factored_embedding import factor_embedding
from lightning_compress.nn.operator_formats import OperatorFormats, preset
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_places import check_finite, find_places
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear

EVERYTHING = preset("w8a8", operators="all")


def test_nothing_but_what_has_a_format_is_looked_for(tiny):
    model = tiny("bert", "BertModel")
    kinds = ("linears", "embeddings", "norms", "activations", "attention")
    assert [len(find_places(model, EVERYTHING)[kind]) for kind in kinds] == [12, 3, 5, 2, 2]
    assert [len(find_places(model, OperatorFormats(norm=True))[kind]) for kind in kinds] == [0, 0, 5, 0, 0]


@pytest.mark.parametrize(
    ("family", "name", "function", "norm"),
    [
        ("distilbert", "DistilBertModel", "gelu", "embeddings.LayerNorm"),
        ("gpt2", "GPT2Model", "gelu_tanh", "ln_f"),
        ("llama", "LlamaModel", "silu", "norm"),
    ],
)
def test_families_differ_in_activations_and_norms(tiny, family, name, function, norm):
    places = find_places(tiny(family, name), EVERYTHING)
    assert set(places["activations"].values()) == {function}
    assert norm in places["norms"] and len(places["norms"]) == 5
    assert len(places["attention"]) == 2


def test_what_widens_narrow_embeddings_is_a_linear_like_others(tiny):
    electra = tiny("electra", "ElectraModel")
    assert "embeddings_project" in find_places(electra, EVERYTHING)["linears"]
    bert = tiny("bert", "BertModel")
    factor_embedding(bert, rank=4)
    places = find_places(bert, EVERYTHING)
    assert "embeddings.word_embeddings.projection" in places["linears"]
    assert "embeddings.word_embeddings.table" in places["embeddings"]


def test_low_rank_layers_are_two_linears(tiny):
    model = tiny("bert", "BertModel")
    output = model.encoder.layer[1].output
    output.dense = LowRankLinear(nn.Linear(48, 3, bias=False), nn.Linear(3, 32))
    linears = find_places(model, EVERYTHING)["linears"]
    assert linears[-2:] == [f"encoder.layer.1.output.dense.{name}" for name in ("down", "up")]


def test_linears_inside_adapters_are_found_under_the_path_of_the_slot(tiny):
    peft = pytest.importorskip("peft")
    model = tiny("bert", "BertModel")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)
    assert find_places(model, EVERYTHING)["linears"][0] == "encoder.layer.0.attention.self.query"


def test_patterns_leave_out_what_they_match_and_have_to_match_something(tiny):
    model = tiny("bert", "BertModel")
    kinds = ("linears", "norms", "activations", "attention")
    places = find_places(model, EVERYTHING, exclude=("encoder.layer.0.*", "embeddings.LayerNorm"))
    assert all(path.startswith("encoder.layer.1.") for kind in kinds for path in places[kind])
    assert [len(places[kind]) for kind in kinds] == [6, 2, 1, 1]


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (("*.layer.9.*",), r"\['\*\.layer\.9\.\*'\] match nothing"),
        (("pooler*",), "match nothing"),
        (("*attention*", "*dense"), "leave none of the 12 linears"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(tiny, exclude, message):
    with pytest.raises(ValueError, match=message):
        find_places(tiny("bert", "BertModel"), preset("w8a8", operators=("linear",)), exclude)


def test_layers_in_training_form_and_quantised_ones_are_refused(tiny):
    model = tiny("bert", "BertModel")
    output = model.encoder.layer[1].output
    dense = output.dense
    for taken, message in (
        (SoftThresholdLinear(dense), "SoftThresholdLinear, which cannot be quantised"),
        (
            QuantizedLinear.from_linear(dense, EVERYTHING.weight),
            r"output.dense is quantised already.*start from the dense model",
        ),
    ):
        output.dense = taken
        with pytest.raises(ValueError, match=message):
            find_places(model, EVERYTHING)
        find_places(model, EVERYTHING, exclude=["*.1.output.dense"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "path",
    ["encoder.layer.1.output.dense", "embeddings.position_embeddings", "encoder.layer.0.output.LayerNorm"],
)
def test_places_whose_weights_are_not_finite_are_named(tiny, path, value):
    model = tiny("bert", "BertModel")
    places = find_places(model, EVERYTHING)
    check_finite(model, places)
    model.get_submodule(path).weight.data.view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"weight of {path} holds NaN or infinities.*exclude it"):
        check_finite(model, places)
    check_finite(model, find_places(model, EVERYTHING, exclude=[path]))
    check_finite(model.to("meta"), places)


def test_factors_and_adapters_in_a_place_are_looked_at_too(tiny):
    peft = pytest.importorskip("peft")
    model = tiny("bert", "BertModel")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), model)
    layer = model.encoder.layer[0]
    layer.output.dense = SoftThresholdLinear(layer.output.dense)
    places = {"linears": ["encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense"]}
    places |= {"embeddings": [], "norms": []}
    check_finite(model, places)
    layer.output.dense.v_MI.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense holds NaN"):
        check_finite(model, places)
    layer.attention.self.query.lora_A["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"self\.query holds NaN"):
        check_finite(model, places)


def test_only_models_of_known_families_are_looked_at():
    with pytest.raises(TypeError, match="PreTrainedModel"):
        find_places(nn.Linear(2, 2), EVERYTHING)
