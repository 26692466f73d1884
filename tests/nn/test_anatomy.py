import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_compress.nn.anatomy import (
    Anatomy,
    UnknownFamilyError,
    base,
    describe,
    known_families,
    register_family,
)
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from lightning_compress.nn.surgery import get_module, linear_shape, replace_module

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# model type, class, base, head modules, pooler, per token
MODELS = [
    ("bert", "BertModel", "", (), "pooler", False),
    ("bert", "BertForSequenceClassification", "bert", ("classifier",), "bert.pooler", False),
    ("bert", "BertForTokenClassification", "bert", ("classifier",), None, True),
    ("bert", "BertForQuestionAnswering", "bert", ("qa_outputs",), None, True),
    ("bert", "BertForMaskedLM", "bert", ("cls",), None, True),
    ("roberta", "RobertaModel", "", (), "pooler", False),
    ("roberta", "RobertaForSequenceClassification", "roberta", ("classifier",), None, False),
    ("roberta", "RobertaForMaskedLM", "roberta", ("lm_head",), None, True),
    ("electra", "ElectraModel", "", (), None, False),
    ("electra", "ElectraForSequenceClassification", "electra", ("classifier",), None, False),
    (
        "electra",
        "ElectraForMaskedLM",
        "electra",
        ("generator_predictions", "generator_lm_head"),
        None,
        True,
    ),
    ("electra", "ElectraForPreTraining", "electra", ("discriminator_predictions",), None, True),
    ("distilbert", "DistilBertModel", "", (), None, False),
    (
        "distilbert",
        "DistilBertForSequenceClassification",
        "distilbert",
        ("pre_classifier", "classifier"),
        None,
        False,
    ),
    (
        "distilbert",
        "DistilBertForMaskedLM",
        "distilbert",
        ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
        None,
        True,
    ),
    ("gpt2", "GPT2Model", "", (), None, True),
    ("gpt2", "GPT2LMHeadModel", "transformer", ("lm_head",), None, True),
    ("gpt2", "GPT2ForSequenceClassification", "transformer", ("score",), None, True),
    ("llama", "LlamaModel", "", (), None, True),
    ("llama", "LlamaForCausalLM", "model", ("lm_head",), None, True),
    ("llama", "LlamaForSequenceClassification", "model", ("score",), None, True),
    ("llama", "LlamaForQuestionAnswering", "transformer", ("qa_outputs",), None, True),
    ("mamba", "MambaModel", "", (), None, True),
    ("mamba", "MambaForCausalLM", "backbone", ("lm_head",), None, True),
]
FAMILIES = [
    ("bert", "BertModel"),
    ("roberta", "RobertaModel"),
    ("electra", "ElectraModel"),
    ("distilbert", "DistilBertModel"),
    ("gpt2", "GPT2Model"),
    ("llama", "LlamaModel"),
    ("mamba", "MambaModel"),
]


def roles_of(anatomy: Anatomy) -> list[str]:
    return [slot.role for slot in anatomy.layers[0].linears]


@pytest.mark.parametrize(("model_type", "name", "base_path", "heads", "pooler", "per_token"), MODELS)
def test_every_task_model_is_described_with_its_base_pooler_and_head(
    tiny, model_type, name, base_path, heads, pooler, per_token
):
    anatomy = describe(tiny(model_type, name))
    assert (anatomy.model_type, anatomy.base) == (model_type, base_path)
    assert anatomy.head_modules == heads
    assert anatomy.head == (heads[-1] if heads else None)
    assert anatomy.pooler == pooler
    assert anatomy.is_head_per_token is per_token


@pytest.mark.parametrize(("model_type", "name"), [model[:2] for model in MODELS])
def test_every_path_named_leads_to_a_module_of_the_expected_kind(tiny, model_type, name):
    model = tiny(model_type, name)
    anatomy = describe(model)
    assert len(anatomy.layers) == 2
    assert isinstance(get_module(model, anatomy.word_embeddings), nn.Embedding)
    assert anatomy.word_embeddings.startswith(anatomy.embeddings)
    for layer in anatomy.layers:
        stack = get_module(model, layer.path.rpartition(".")[0])
        assert get_module(model, layer.path) is list(stack.children())[layer.index]
        for slot in layer.linears:
            assert isinstance(get_module(model, slot.path), nn.Linear | Conv1D)
            assert (slot.layer, slot.path.startswith(f"{layer.path}.")) == (layer.index, True)
        for norm in layer.norms:
            assert "norm" in type(get_module(model, norm)).__name__.lower()
    if anatomy.final_norm is not None:
        assert "norm" in type(get_module(model, anatomy.final_norm)).__name__.lower()


READERS = {
    "BertModel": ("pooler.dense",),
    "BertForSequenceClassification": ("bert.pooler.dense",),
    "BertForMultipleChoice": ("bert.pooler.dense",),
    "BertForTokenClassification": ("classifier",),
    "BertForPreTraining": ("bert.pooler.dense", "cls.predictions.transform.dense"),
    "RobertaForSequenceClassification": ("classifier.dense",),
    "RobertaForMultipleChoice": ("roberta.pooler.dense",),
    "RobertaForMaskedLM": ("lm_head.dense",),
    "ElectraForSequenceClassification": ("classifier.dense",),
    "ElectraForMultipleChoice": ("sequence_summary.summary",),
    "ElectraForMaskedLM": ("generator_predictions.dense",),
    "ElectraForPreTraining": ("discriminator_predictions.dense",),
    "DistilBertForSequenceClassification": ("pre_classifier",),
    "DistilBertForMultipleChoice": ("pre_classifier",),
    "DistilBertForTokenClassification": ("classifier",),
    "DistilBertForMaskedLM": ("vocab_transform",),
    "GPT2LMHeadModel": ("lm_head",),
    "GPT2ForSequenceClassification": ("score",),
    "LlamaForCausalLM": ("lm_head",),
    "LlamaModel": (),
    "MambaForCausalLM": (),
}


@pytest.mark.parametrize("name", READERS)
def test_what_writes_to_the_residual_stream_and_reads_from_it_is_as_wide_as_it(tiny, name):
    model_type = next(kind for kind, _ in FAMILIES if name.lower().startswith(kind))
    model = tiny(model_type, name)
    anatomy = describe(model)
    assert anatomy.residual_readers == READERS[name]
    assert {linear_shape(get_module(model, path))[0] for path in anatomy.residual_readers} <= {32}
    widths = {path: get_module(model, path).weight.shape for path in anatomy.residual_writers}
    outputs = [shape[0] if path.endswith("project") else shape[-1] for path, shape in widths.items()]
    assert outputs == [32] * len(outputs) and bool(outputs) is (model_type != "mamba")
    inner = {slot.path for slot in anatomy.linears} | {
        norm for layer in anatomy.layers for norm in layer.norms
    }
    assert not inner & {*anatomy.residual_readers, *anatomy.residual_writers}


@pytest.mark.parametrize(("model_type", "name"), [family for family in FAMILIES if family[0] != "mamba"])
def test_the_attention_module_has_the_attributes_that_count_its_heads(tiny, model_type, name):
    model = tiny(model_type, name)
    for layer in describe(model).layers:
        attention = get_module(model, layer.attention)
        counts = [getattr(attention, attribute) for attribute in layer.head_count_attributes]
        widths = [getattr(attention, attribute) for attribute in layer.head_width_attributes]
        assert (set(counts), set(widths)) == ((set(), set()) if model_type == "llama" else ({4}, {32}))


@pytest.mark.parametrize(("model_type", "name"), FAMILIES)
def test_sizes_are_those_of_the_configuration_before_any_surgery(tiny, model_type, name):
    anatomy = describe(tiny(model_type, name))
    layer = anatomy.layers[1]
    assert (anatomy.hidden_size, anatomy.vocab_size) == (32, 50)
    if model_type == "mamba":
        assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim, layer.intermediate_size) == (
            0,
            0,
            0,
            64,
        )
    else:
        key_value_heads = 2 if model_type == "llama" else 4
        assert (layer.num_heads, layer.num_key_value_heads, layer.head_dim) == (4, key_value_heads, 8)
        assert layer.intermediate_size == 48


@pytest.mark.parametrize(
    ("model_type", "name", "roles"),
    [
        ("bert", "BertModel", ["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]),
        ("distilbert", "DistilBertModel", ["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]),
        ("gpt2", "GPT2Model", ["query_key_value", "attention_output", "ffn_in", "ffn_out"]),
        (
            "llama",
            "LlamaModel",
            ["query", "key", "value", "attention_output", "ffn_gate", "ffn_in", "ffn_out"],
        ),
        ("mamba", "MambaModel", ["mixer_in", "mixer_out"]),
    ],
)
def test_linears_carry_the_roles_of_their_family_in_running_order(tiny, model_type, name, roles):
    assert roles_of(describe(tiny(model_type, name))) == roles


@pytest.mark.parametrize(("model_type", "name"), FAMILIES)
def test_families_name_the_activation_of_their_ffn(tiny, model_type, name):
    model = tiny(model_type, name)
    for layer in describe(model).layers:
        if model_type == "mamba":
            assert layer.activation is None
            continue
        activation = type(get_module(model, layer.activation)).__name__.lower()
        assert ("silu" if model_type == "llama" else "gelu") in activation


@pytest.mark.parametrize(("model_type", "name"), FAMILIES)
def test_post_norm_families_name_their_encoder_and_dropouts(tiny, model_type, name):
    model = tiny(model_type, name)
    anatomy, layer = describe(model), describe(model).layers[1]
    inner = [layer.attention_dropout, layer.ffn_dropout]
    if not anatomy.is_post_norm:
        assert (anatomy.encoder, inner, layer.output_dropout) == (None, [None] * 2, None)
        return
    assert get_module(model, f"{anatomy.encoder}.layer.1") is get_module(model, layer.path)
    assert (layer.output_dropout is None) is (model_type == "distilbert")
    for path in [*inner, *([] if layer.output_dropout is None else [layer.output_dropout])]:
        assert isinstance(get_module(model, path), nn.Dropout)


@pytest.mark.parametrize(("model_type", "name"), [family for family in FAMILIES if family[0] != "mamba"])
def test_the_module_named_as_attention_runs_once_per_layer_and_holds_the_layer_index(tiny, model_type, name):
    model = tiny(model_type, name)
    calls: list[str] = []
    for layer in describe(model).layers:
        assert layer.attention is not None
        attention = get_module(model, layer.attention)
        attention.register_forward_hook(lambda module, args, out, path=layer.attention: calls.append(path))
        assert getattr(attention, "layer_idx", layer.index) == layer.index
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert calls == [layer.attention for layer in describe(model).layers]


def test_orders_of_norm_and_direction_tell_encoders_from_decoders(tiny):
    bert, gpt2 = describe(tiny("bert", "BertModel")), describe(tiny("gpt2", "GPT2Model"))
    assert (bert.is_post_norm, bert.is_decoder, bert.final_norm) == (True, False, None)
    assert (gpt2.is_post_norm, gpt2.is_decoder, gpt2.final_norm) == (False, True, "ln_f")


def test_only_embeddings_of_another_width_have_a_projection(tiny):
    assert (
        describe(tiny("electra", "ElectraForMaskedLM")).embedding_projection == "electra.embeddings_project"
    )
    assert describe(tiny("electra", "ElectraModel", embedding_size=32)).embedding_projection is None


def test_mamba_names_the_linears_that_are_read_as_raw_weights(tiny):
    layer = describe(tiny("mamba", "MambaForCausalLM")).layers[1]
    assert layer.raw_linears == ("backbone.layers.1.mixer.x_proj", "backbone.layers.1.mixer.dt_proj")
    assert layer.attention is None


@pytest.mark.parametrize(("model_type", "name"), FAMILIES)
def test_linears_replaced_by_low_rank_ones_leave_the_anatomy_as_it_was(tiny, model_type, name):
    model = tiny(model_type, name)
    before = describe(model)
    for slot in before.linears:
        in_features, out_features = linear_shape(get_module(model, slot.path))
        thin = LowRankLinear(nn.Linear(in_features, 2, bias=False), nn.Linear(2, out_features))
        replace_module(model, slot.path, thin)
    assert describe(model) == before


def test_linears_in_training_form_leave_the_anatomy_as_it_was(tiny):
    model = tiny("gpt2", "GPT2LMHeadModel")
    before = describe(model)
    for slot in before.linears:
        replace_module(model, slot.path, SoftThresholdLinear(get_module(model, slot.path)))
    assert describe(model) == before


def test_head_counts_and_ffn_widths_are_read_off_each_layer(tiny):
    model = tiny("llama", "LlamaForCausalLM")
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.q_proj, attention.o_proj = nn.Linear(32, 16), nn.Linear(16, 32)
    attention.k_proj, attention.v_proj = nn.Linear(32, 8), nn.Linear(32, 8)
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 20), nn.Linear(32, 20), nn.Linear(20, 32)
    full, pruned = describe(model).layers
    assert (full.num_heads, full.num_key_value_heads, full.intermediate_size) == (4, 2, 48)
    assert (pruned.num_heads, pruned.num_key_value_heads, pruned.intermediate_size) == (2, 1, 20)


def test_heads_pruned_from_the_fused_projection_of_gpt2_are_seen(tiny):
    model = tiny("gpt2", "GPT2Model")
    model.h[0].attn.c_attn, model.h[0].attn.c_proj = Conv1D(3 * 8, 32), Conv1D(32, 8)
    assert [layer.num_heads for layer in describe(model).layers] == [1, 4]


def test_a_layer_taken_out_of_the_stack_is_gone_from_the_anatomy(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    del model.bert.encoder.layer[0]
    (layer,) = describe(model).layers
    assert (layer.index, layer.path) == (0, "bert.encoder.layer.0")


def test_a_narrower_residual_stream_is_read_off_the_layers(tiny):
    model = tiny("bert", "BertModel")
    model.encoder.layer[0].output.dense = nn.Linear(48, 24)
    assert describe(model).hidden_size == 24


@PEFT_WARNS
def test_lora_keeps_slot_paths_at_the_wrapper(tiny):
    peft = pytest.importorskip("peft")
    model = tiny("bert", "BertForSequenceClassification")
    before = describe(model)
    peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
    assert hasattr(get_module(model, before.linears[0].path), "base_layer")
    assert describe(model) == before


def test_something_that_is_no_transformers_model_is_refused_with_the_remedy(tiny):
    with pytest.raises(TypeError, match=r"got Sequential.*find_transformer"):
        describe(nn.Sequential(tiny("bert", "BertModel")))


def test_an_unknown_family_is_refused_with_known_ones_and_the_way_to_register(tiny):
    model = tiny("bert", "BertModel")
    model.config.model_type = "martian"
    with pytest.raises(
        UnknownFamilyError, match=r"'martian' \(BertModel\).*bert, distilbert.*register_family"
    ):
        describe(model)


def test_a_rearranged_model_is_refused_with_the_path_looked_for(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    del model.bert.encoder.layer[1].intermediate.dense
    with pytest.raises(UnknownFamilyError, match=r"bert\.encoder\.layer\.1\.intermediate\.dense"):
        describe(model)


@pytest.mark.parametrize(
    ("model_type", "name", "changes"),
    [("bert", "BertLMHeadModel", {"is_decoder": True}), ("gpt2", "GPT2LMHeadModel", {})],
)
def test_cross_attention_is_refused(tiny, model_type, name, changes):
    with pytest.raises(UnknownFamilyError, match="add_cross_attention=True"):
        describe(tiny(model_type, name, add_cross_attention=True, **changes))


def test_a_family_registered_by_a_user_is_described_by_his_function(tiny, monkeypatch):
    monkeypatch.setattr(base, "_FAMILIES", dict(base._FAMILIES))
    plain = describe(tiny("bert", "BertModel"))

    class NewConfig(PretrainedConfig):
        model_type = "new-family"

    class NewModel(PreTrainedModel):
        config_class = NewConfig

    @register_family("new-family")
    def describe_new(model: PreTrainedModel) -> Anatomy:
        assert isinstance(model, NewModel)
        return plain

    assert "new-family" in known_families()
    assert describe(NewModel(NewConfig())) is plain


def test_a_family_is_registered_once_but_its_own_definition_may_run_again(monkeypatch):
    monkeypatch.setattr(base, "_FAMILIES", dict(base._FAMILIES))
    known = base._FAMILIES["bert"]
    assert register_family("bert")(known) is known
    with pytest.raises(ValueError, match="'bert' is registered already, by <function describe_bert"):
        register_family("bert")(lambda model: known(model))
