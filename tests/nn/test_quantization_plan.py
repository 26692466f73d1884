import copy
import json

import pytest
import torch
from torch import nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.nn.operator_formats import OperatorFormats, preset
from lightning_compress.nn.quantization_plan import quantize_model, restore_quantized
from lightning_compress.nn.quantized_linear import QuantizedLinear
from lightning_compress.nn.quantized_parts import QuantizedActivation, QuantizedEmbedding, QuantizedNorm
from lightning_compress.nn.soft_threshold_rank import LowRankLinear
from lightning_compress.nn.surgery import Ledger
from lightning_compress.plan import PlanError
from tests.toys import CLASSIFIERS

IDS = torch.tensor([[5, 9, 33, 2, 17, 8], [7, 41, 3, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("family", CLASSIFIERS, ids=lambda pair: pair[0])
def test_a_model_with_everything_quantised_to_8_bits_is_near_the_dense_one(tiny, family, factor):
    dense, model = tiny(*family), tiny(*family)
    quantize_model(model, preset("w8a8", factor=factor, operators="all"))
    assert not torch.equal(logits(model), logits(dense))
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.0, atol=5e-3)


@pytest.mark.parametrize("family", CLASSIFIERS, ids=lambda pair: pair[0])
@pytest.mark.parametrize(
    "formats",
    [
        preset("w8a8"),
        preset("w4a8", block=(2, 8), factor="shift", operators="all"),
        preset("w8", operators=("linear",)),
        OperatorFormats(softmax=True, norm=True),
    ],
    ids=["rows", "tiles", "weights", "integers"],
)
def test_a_restored_structure_with_the_state_loaded_is_equal_bit_by_bit(tiny, family, formats):
    model = tiny(*family)
    structure = json.loads(json.dumps(quantize_model(model, formats)))
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        skeleton = type(model)(config)
    restore_quantized(skeleton, structure)
    assert {n: (t.shape, t.dtype) for n, t in skeleton.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in model.state_dict().items()
    }
    fresh = tiny(*family)
    restore_quantized(fresh, structure)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def test_the_structure_names_what_was_quantised_and_leaves_pooler_and_head(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    structure = quantize_model(model, preset("w8a8", operators="all"))
    layer = "bert.encoder.layer.0"
    assert structure["linears"][:6] == [
        f"{layer}.{name}"
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ]
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    assert structure["embeddings"] == [f"bert.embeddings.{name}" for name in tables]
    assert structure["norms"][:2] == ["bert.embeddings.LayerNorm", f"{layer}.attention.output.LayerNorm"]
    assert structure["activations"][f"{layer}.intermediate.intermediate_act_fn"] == "gelu"
    assert structure["attention"] == [f"bert.encoder.layer.{index}.attention.self" for index in (0, 1)]
    kinds = [type(module) for module in model.modules()]
    assert [kinds.count(k) for k in (QuantizedLinear, QuantizedEmbedding, QuantizedNorm)] == [12, 3, 5]
    assert kinds.count(QuantizedActivation) == 2
    assert type(model.bert.pooler.dense) is type(model.classifier) is nn.Linear


def test_excluded_modules_stay_as_they_are(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    structure = quantize_model(model, preset("w8a8"), exclude=("*.layer.0.*", "*position_embeddings"))
    assert len(structure["linears"]) == 6 and all(".layer.1." in path for path in structure["linears"])
    assert type(model.bert.embeddings.position_embeddings) is nn.Embedding
    assert type(model.bert.encoder.layer[0].output.dense) is nn.Linear


def test_layers_without_integer_attention_attend_as_before(tiny):
    dense, model = (tiny("bert", "BertForSequenceClassification") for _ in range(2))
    quantize_model(model, OperatorFormats(softmax=True), exclude=("*.layer.1.*",))
    assert model.bert.encoder.layer[0].attention.self.block_attention.softmax
    assert not hasattr(model.bert.encoder.layer[1].attention.self, "block_attention")
    torch.testing.assert_close(logits(model), logits(dense), rtol=0.0, atol=5e-3)


def test_costs_count_weights_and_operations_whatever_their_bits(tiny):
    dense, model = (tiny("electra", "ElectraForSequenceClassification") for _ in range(2))
    quantize_model(model, preset("w4a8", operators="all"))
    assert count_parameters(model) == count_parameters(dense)
    assert count_flops(model, [3, 5]) == count_flops(dense, [3, 5])
    of_dense, of_model = describe(dense), describe(model)
    assert of_model == of_dense


def test_both_factors_of_low_rank_layers_are_quantised(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = LowRankLinear(nn.Linear(32, 4, bias=False), nn.Linear(4, 32))
    before, flops = logits(model), count_flops(model, [4])
    structure = quantize_model(model, preset("w8a8"))
    path = "bert.encoder.layer.0.attention.self.query"
    assert {f"{path}.down", f"{path}.up"} <= set(structure["linears"]) and path not in structure["linears"]
    assert type(attention.query.up) is QuantizedLinear and count_flops(model, [4]) == flops
    torch.testing.assert_close(logits(model), before, rtol=0.0, atol=5e-3)


def test_tables_that_share_weights_with_a_head_stay(tiny):
    model = tiny("gpt2", "GPT2LMHeadModel")
    assert quantize_model(model, preset("w8a8"))["embeddings"] == ["transformer.wpe"]
    assert model.lm_head.weight is model.transformer.wte.weight
    tied = tiny("llama", "LlamaForCausalLM", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="share their weights"):
        quantize_model(tied, preset("w8a8", operators="embedding"))
    assert quantize_model(tied, preset("w8a8"))["embeddings"] == []
    assert (
        isinstance(tied.model.embed_tokens, nn.Embedding)
        and tied.lm_head.weight is tied.model.embed_tokens.weight
    )
    untied = tiny("llama", "LlamaForCausalLM", tie_word_embeddings=False)
    assert quantize_model(untied, preset("w8a8"))["embeddings"] == ["model.embed_tokens"]


def test_linears_of_mamba_are_quantised_and_what_it_lacks_is_refused(tiny):
    dense, model = (tiny("mamba", "MambaForCausalLM", tie_word_embeddings=False) for _ in range(2))
    structure = quantize_model(model, preset("w8a8", operators=("linear", "embedding", "norm")))
    assert structure["linears"][:2] == [f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "out_proj")]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=0.0, atol=5e-2)
    for operator, kind in (
        ("attention", "attention"),
        ("softmax", "attention"),
        ("activation", "activations"),
    ):
        with pytest.raises(ValueError, match=f"has no {kind}"):
            quantize_model(dense, preset("w8a8", operators=(operator,)))


def test_a_decoder_makes_the_same_of_a_prefix_with_and_without_what_follows(tiny):
    model = tiny("llama", "LlamaForCausalLM")
    quantize_model(
        model, preset("w8a8", factor="shift", operators=("linear", "attention", "softmax", "norm"))
    )
    with torch.no_grad():
        whole, prefix = model(IDS[:1]).logits[:, :4], model(IDS[:1, :4]).logits
        cached = model(IDS[:1, :3], use_cache=True)
        step = model(IDS[:1, 3:4], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(whole, prefix, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(step, prefix[:, 3:], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_ledger_undoes_everything(tiny, implementation):
    model = tiny("bert", "BertForSequenceClassification")
    model.config._attn_implementation = implementation
    dense, state = logits(model), copy.deepcopy(model.state_dict())
    ledger = Ledger(model)
    bias = model.bert.encoder.layer[0].output.dense.bias
    quantize_model(model, preset("w8a8", operators="all"), ledger=ledger)
    assert model.bert.encoder.layer[0].output.dense.bias is bias
    model, ledger = copy.deepcopy((model, ledger))
    ledger.revert()
    assert model.config._attn_implementation == implementation
    assert not any(
        isinstance(m, QuantizedLinear | QuantizedEmbedding | QuantizedNorm) for m in model.modules()
    )
    model.load_state_dict(state)
    torch.testing.assert_close(logits(model), dense)


def test_blanks_of_tables_come_back_in_the_dtype_of_the_model(tiny):
    model = tiny("bert", "BertForSequenceClassification").bfloat16()
    ledger = Ledger(model)
    quantize_model(model, preset("w8a8"), ledger=ledger)
    assert logits(model).dtype == torch.bfloat16
    ledger.revert()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_two_calls_can_quantise_different_operators_but_nothing_twice(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    quantize_model(model, preset("w8a8", operators=("linear", "softmax")))
    quantize_model(model, preset("w4a4", operators=("embedding",)))
    for operators in (("linear",), ("attention",)):
        with pytest.raises(ValueError, match="quantised already"):
            quantize_model(model, preset("w8a8", operators=operators))
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(model, preset("w8a8", operators=("embedding",)))


def test_patterns_and_operators_that_find_nothing_are_refused_before_anything_changes(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    for formats, exclude, message in (
        (preset("w8a8"), ("*.layer.7.*",), r"exclude=\['\*\.layer\.7\.\*'\] match nothing"),
        (preset("w8a8"), ("*dense", "*query", "*key", "*value"), "leave none of the 12 linears"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_model(model, formats, exclude)
    tanh = tiny("bert", "BertForSequenceClassification", hidden_act="tanh")
    with pytest.raises(ValueError, match="cannot be quantised"):
        quantize_model(tanh, preset("w8a8", operators="all"))
    for untouched in (model, tanh):
        assert not any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in untouched.modules())


def good_structure(**changes):
    lists = {"linears": [], "embeddings": [], "norms": [], "activations": {}, "attention": []}
    formats = preset("w8a8", operators="all").to_dict()
    return {"formats": formats, **lists, **changes}


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({}, "needs the structure"),
        (good_structure(more=[]), "needs the structure"),
        (good_structure(formats={"weight": {"bits": 99}}), "unusable formats"),
        (good_structure(formats=[]), "unusable formats"),
        (good_structure(linears="all"), "listed by path"),
        (good_structure(activations=["gelu"]), "listed by path"),
        (good_structure(linears=["bert.encoder.layer.9.output.dense"]), "does not fit"),
        (good_structure(linears=[3]), "is no path"),
        (good_structure(linears=["bert.embeddings.word_embeddings"]), "it is a Embedding"),
        (good_structure(embeddings=["bert.pooler.dense"]), "it is a Linear"),
        (good_structure(norms=["bert.pooler.dense"]), "it is a Linear"),
        (good_structure(attention=["bert.pooler.activation"]), "it is a Tanh"),
        (good_structure(activations={"bert.pooler.dense": "gelu"}), "it is a Linear"),
        (good_structure(activations={"bert.pooler.activation": "mish"}), "'mish'"),
        (good_structure(formats={}, linears=["bert.pooler.dense"]), "no format for them"),
    ],
)
def test_structures_that_do_not_fit_are_refused_before_anything_changes(tiny, structure, message):
    model = tiny("bert", "BertForSequenceClassification")
    before = repr(model)
    with pytest.raises(PlanError, match=message):
        restore_quantized(model, structure)
    assert repr(model) == before


def test_weights_that_are_not_finite_are_refused(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    before = repr(model)
    with pytest.raises(ValueError, match=r"weight of bert\.encoder\.layer\.1\.output\.dense holds NaN"):
        quantize_model(model, preset("w8a8"))
    assert repr(model) == before


def test_restoring_reads_no_weights(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    structure = quantize_model(copy.deepcopy(model), OperatorFormats(weight=BlockFormat()))
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.fill_(torch.nan)
    restore_quantized(model, structure)
    assert type(model.bert.encoder.layer[1].output.dense) is QuantizedLinear
