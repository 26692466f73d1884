"""Taking heads, neurons and channels out of whole models: sliced equals zeroed, in every family."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertModel

from lightning_compress import load
from lightning_compress.deploy.save import attach_plan
from lightning_compress.methods import METHODS
from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.nn.surgery import Ledger, get_module
from lightning_compress.nn.width_surgery import Widths, apply_widths, restore_widths
from lightning_compress.plan import CompressionPlan, MethodRecord, PlanError
from lightning_compress.runtime.packing import pack, unpack
from lightning_compress.runtime.static import make_static
from tests.toys import CLASSIFIERS
from tests.toys_widths import IDS, MASK, lively, logits, zero_heads, zero_neurons

POST_NORM = CLASSIFIERS[:4]
LANGUAGE_MODELS = [("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM")]
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_all_layers_may_keep_different_widths(tiny, model_type, name, attention) -> None:
    model = lively(tiny(model_type, name, num_labels=3))
    model.config._attn_implementation = attention
    zero_heads(model, 0, [1])
    zero_neurons(model, 0, [2, 5])
    zero_neurons(model, 1, list(range(1, 48)))
    expected = logits(model)
    groups = describe(model).layers[0].num_key_value_heads
    heads = tuple(head for head in range(groups) if head != 1)
    neurons = tuple(neuron for neuron in range(48) if neuron not in (2, 5))
    apply_widths(model, Widths(heads=(heads, None), neurons=(neurons, (0,))), Ledger(model))
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_full_width_is_the_identity_to_the_last_bit(tiny, model_type, name) -> None:
    model = lively(tiny(model_type, name, num_labels=3))
    expected, groups = logits(model), describe(model).layers[0].num_key_value_heads
    apply_widths(model, Widths((tuple(range(groups)),) * 2, (tuple(range(48)),) * 2), Ledger(model))
    assert torch.equal(logits(model), expected)
    apply_widths(model, Widths.full(2), Ledger(model))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_a_sliced_model_still_trains(tiny, model_type, name) -> None:
    model = tiny(model_type, name, num_labels=3).train()
    apply_widths(model, Widths(((0,), (1,)), ((1, 2), None)), Ledger(model))
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
    inner = [p for slot in describe(model).linears for p in get_module(model, slot.path).parameters()]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in inner)


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_reverting_gives_the_shapes_and_head_counts_back(tiny, model_type, name) -> None:
    model = tiny(model_type, name, num_labels=3)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    before, weights = describe(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected, ledger = logits(model), Ledger(model)
    apply_widths(model, Widths(((1,), (0,)), ((1, 2), (3,))), ledger)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} != shapes
    ledger.revert()
    assert describe(model) == before
    model.load_state_dict(weights)
    assert torch.equal(logits(model), expected)


def test_nothing_is_changed_where_one_width_does_not_fit(tiny) -> None:
    model = tiny("bert", "BertModel")
    before = describe(model)
    with pytest.raises(ValueError, match=r"neurons kept in layer 1 are \[48\]"):
        apply_widths(model, Widths(((0,), (0,)), ((0,), (48,))), Ledger(model))
    with pytest.raises(ValueError, match="the model has 2 layers"):
        apply_widths(model, Widths.full(3), Ledger(model))
    assert describe(model) == before


def some_widths(model: nn.Module) -> Widths:
    groups = describe(model).layers[0].num_key_value_heads
    hidden = None if type(model).__name__ == "BertForMaskedLM" else tuple(range(0, 32, 2))
    return Widths(((groups - 1,), None), (None, (3, 5, 40)), embedding_rank=5, hidden=hidden)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS + LANGUAGE_MODELS)
def test_a_plan_rebuilds_the_shapes_and_weights_make_the_rest(tiny, model_type, name, device) -> None:
    model = lively(tiny(model_type, name))
    fresh = copy.deepcopy(model).to(device)
    widths = some_widths(model)
    apply_widths(model, widths, Ledger(model))
    restore_widths(fresh, json.loads(json.dumps(widths.to_structure())))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in fresh.state_dict().items()} == shapes
    assert describe(fresh) == describe(model)
    fresh.load_state_dict(model.state_dict(), assign=device == "meta")
    fresh.tie_weights()
    assert device == "meta" or torch.equal(logits(fresh.eval()), logits(model))


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS + LANGUAGE_MODELS)
def test_a_saved_model_opens_in_transformers_and_computes_the_same(
    tiny, model_type, name, tmp_path, monkeypatch
) -> None:
    if "width_slimming" not in METHODS:
        monkeypatch.setitem(METHODS, "width_slimming", SimpleNamespace(restore=restore_widths))
    model, widths = lively(tiny(model_type, name)), some_widths(tiny(model_type, name))
    model.config._attn_implementation = "sdpa"
    apply_widths(model, widths, Ledger(model))
    record = MethodRecord("width_slimming", "converted", {}, widths.to_structure())
    attach_plan(model, CompressionPlan(model_type, (record,)))
    model.save_pretrained(tmp_path)
    for opened in (load(tmp_path), getattr(transformers, name).from_pretrained(tmp_path)):
        assert torch.equal(logits(opened), logits(model))
        assert describe(opened) == describe(model)
    opened.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert describe(base).layers[0].num_heads == describe(model).layers[0].num_heads


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", [[0, 4], None], "from 0 to 3"),
        ("heads", [["0"], None], "lists of whole numbers or null"),
        ("heads", [None], "a list of 2 entries"),
        ("neurons", [49, None], "from 1 to 48, got 49"),
        ("neurons", [None, True], "from 1 to 48, got True"),
        ("neurons", None, "a list of 2 entries"),
        ("embedding_rank", 33, "outside 1 to 32"),
        ("embedding_rank", "8", "outside 1 to 32"),
        ("hidden", 0, "from 1 to 32, got 0"),
        ("more", 1, "expected the fields"),
    ],
)
def test_impossible_plans_are_refused_before_anything_changes(tiny, field, value, message) -> None:
    model = tiny("bert", "BertModel")
    before = describe(model)
    structure = {**Widths.full(2).to_structure(), "neurons": [3, None], field: value}
    with pytest.raises(PlanError, match=message):
        restore_widths(model, structure)
    assert describe(model) == before


# Table of the specification, §1.3: heads, neurons, embedding rank -> millions of parameters and GMAC at 128 tokens
SIZES = [
    (8, 2048, 512, 73.16, 7.50),
    (8, 1024, 512, 54.27, 5.08),
    (6, 1536, 384, 54.98, 5.63),
    (4, 1024, 256, 36.81, 3.75),
    (4, 512, 256, 27.37, 2.54),
    (3, 768, 192, 27.73, 2.81),
    (2, 512, 128, 18.64, 1.88),
    (2, 256, 128, 13.92, 1.27),
]


@pytest.mark.parametrize(("heads", "neurons", "rank", "millions", "gmacs"), SIZES)
def test_bert_base_shrinks_to_the_sizes_of_the_paper(heads, neurons, rank, millions, gmacs) -> None:
    with torch.device("meta"):
        model = BertModel(BertConfig(), add_pooling_layer=False)
        exits = nn.ModuleList(nn.Linear(768, 2) for _ in range(12))
    widths = Widths((tuple(range(heads)),) * 12, (tuple(range(neurons)),) * 12, rank)
    apply_widths(model, widths, Ledger(model))
    total = count_parameters(model).total + sum(parameter.numel() for parameter in exits.parameters())
    width = 64 * heads
    attention = 3 * (768 * width + width) + 768 * width + 768
    layer = attention + 768 * neurons + neurons + neurons * 768 + 768 + 4 * 768
    embeddings = 30522 * rank + rank * 768 + (512 + 2 + 2) * 768
    assert total == 12 * layer + embeddings + 12 * (768 * 2 + 2)
    assert round(total / 1e6, 2) == millions
    macs = 12 * 128 * (4 * 768 * width + 2 * 768 * neurons + 2 * 128 * width) + 128 * rank * 768
    assert count_flops(model, [128]).total == 2 * macs
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.01)


@pytest.mark.parametrize("is_packed_first", [True, False])
@pytest.mark.parametrize(("model_type", "name"), POST_NORM)
def test_the_packed_engine_runs_narrow_layers(tiny, model_type, name, is_packed_first) -> None:
    model = lively(tiny(model_type, name, num_labels=3)).double()
    twin, widths = copy.deepcopy(model), some_widths(model)
    apply_widths(model, widths, Ledger(model))
    expected = logits(model)
    if is_packed_first:
        pack(twin)
        logits(twin)  # query, key and value are one product now
    apply_widths(twin, widths, Ledger(twin))
    pack(twin)
    for _ in range(2):
        assert torch.allclose(logits(twin), expected, atol=1e-12)
    assert torch.allclose(logits(unpack(twin)), expected, atol=1e-12)


def test_narrow_layers_run_at_static_shapes_too(tiny) -> None:
    model = lively(tiny("bert", "BertForSequenceClassification"))
    apply_widths(model, some_widths(model), Ledger(model))
    expected = logits(model)
    assert torch.allclose(logits(make_static(model)), expected, atol=1e-5)


def test_half_precision_models_are_cut_as_they_are(tiny) -> None:
    model = lively(tiny("bert", "BertForSequenceClassification")).bfloat16()
    apply_widths(model, some_widths(model), Ledger(model))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(logits(model).isfinite().all())


def test_what_is_quantised_is_refused_before_anything_changes(tiny) -> None:
    model = tiny("bert", "BertModel")
    model.encoder.layer[1].output.dense = nn.Bilinear(2, 2, 2)
    model.encoder.layer[1].output.dense.in_features = model.encoder.layer[1].output.dense.out_features = 48
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    with pytest.raises(TypeError, match=r"Bilinear at encoder\.layer\.1\.output\.dense is no linear layer"):
        apply_widths(model, Widths(((0,), (0,)), (None, None)), Ledger(model))
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before


@PEFT_WARNS
@pytest.mark.parametrize(("model_type", "name"), [CLASSIFIERS[0], CLASSIFIERS[2], CLASSIFIERS[5]])
def test_models_with_lora_are_cut_with_their_adapters(tiny, model_type, name) -> None:
    peft = pytest.importorskip("peft")
    model = tiny(model_type, name, num_labels=3)
    targets = sorted({slot.path.rpartition(".")[2] for slot in describe(model).linears})
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=targets, init_lora_weights=False)
    whole = peft.get_peft_model(model, lora)
    merged = copy.deepcopy(whole).merge_and_unload()
    widths = some_widths(model)
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    for cut in (model, merged):
        apply_widths(cut, Widths(widths.heads, widths.neurons, hidden=tuple(range(32))), Ledger(cut))
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    ledger = Ledger(model)
    apply_widths(model, Widths((None,) * 2, (None,) * 2, hidden=(0, 3, 5)), ledger)
    assert logits(model).shape == (2, 3) and describe(model).hidden_size == 3
    assert {p.shape[-1] for name, p in model.named_parameters() if "query.lora_A" in name} <= {3}
    ledger.revert()
    assert describe(model).hidden_size == 32 and logits(model).shape == (2, 3)


@pytest.mark.parametrize(("model_type", "name"), LANGUAGE_MODELS[1:])
def test_narrow_decoders_generate_with_their_cache_what_they_do_without(tiny, model_type, name) -> None:
    model = lively(tiny(model_type, name))
    apply_widths(model, some_widths(model), Ledger(model))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    ids = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
    cached, plain = (model.generate(**ids, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (1, 12)


def test_layers_with_shared_weights_are_refused(tiny) -> None:
    model = tiny("bert", "BertModel")
    first, second = (layer.intermediate.dense for layer in model.encoder.layer)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"weights of encoder\.layer\.0\.intermediate\.dense are shared"):
        apply_widths(model, Widths((None,) * 2, ((0, 1), None)), Ledger(model))


def test_a_family_without_ffn_keeps_what_it_has(tiny) -> None:
    model = tiny("mamba", "MambaModel")
    with pytest.raises(ValueError, match="has no FFN"):
        apply_widths(model, Widths((None,) * 2, ((0, 1), None)), Ledger(model))
