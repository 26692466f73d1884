import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_flops, count_parameters, flops_per_token
from lightning_compress.nn.soft_threshold_rank import LowRankLinear, SoftThresholdLinear
from lightning_compress.nn.surgery import get_module, linear_shape, replace_module

PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LENGTHS = [7, 7]

# Everything but Mamba, whose scan and convolution we do not count, is matched exactly.
MODELS = [
    ("bert", "BertModel"),
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertForTokenClassification"),
    ("bert", "BertForMaskedLM"),
    ("bert", "BertForQuestionAnswering"),
    ("roberta", "RobertaModel"),
    ("roberta", "RobertaForSequenceClassification"),
    ("roberta", "RobertaForMaskedLM"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("distilbert", "DistilBertForMaskedLM"),
    ("electra", "ElectraForSequenceClassification"),
    ("electra", "ElectraForMaskedLM"),
    ("electra", "ElectraForPreTraining"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt2", "GPT2ForSequenceClassification"),
    ("llama", "LlamaForCausalLM"),
    ("llama", "LlamaForSequenceClassification"),
]


def counted_by_torch(model: nn.Module, lengths: list[int] = LENGTHS) -> dict[str, float]:
    """FLOPs by operator of one unpadded batch, the angles of rotary positions left out."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.full((len(lengths), lengths[0]), 5))
    counts = counter.get_flop_counts()
    total = {str(op): float(flops) for op, flops in counts["Global"].items()}
    for name, inner in counts.items():
        if name.endswith("rotary_emb"):
            for op, flops in inner.items():
                total[str(op)] -= flops
    return total


@pytest.mark.parametrize(("model_type", "name"), MODELS)
def test_the_count_equals_that_of_the_torch_flop_counter(tiny, model_type, name):
    model = tiny(model_type, name)
    flops = count_flops(model, LENGTHS)
    assert flops.total == sum(counted_by_torch(model).values())
    assert flops.total == sum(flops.layers) + flops.head + flops.embeddings


def test_the_linears_of_mamba_equal_those_of_the_torch_flop_counter(tiny):
    model = tiny("mamba", "MambaForCausalLM")
    by_torch = counted_by_torch(model)
    linears = by_torch["aten.mm"] + by_torch.get("aten.addmm", 0.0)
    # dt_proj is a batched product beside those of the scan, which reads 4 states per channel and token.
    scan = 2 * 2 * sum(LENGTHS) * 64 * 4
    assert count_flops(model, LENGTHS).total == linears + by_torch["aten.bmm"] - scan


def test_bert_base_has_the_size_and_the_cost_at_128_tokens_worked_out_by_hand():
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_labels=2))
    flops = count_flops(model, [128])
    assert sum(flops.layers) == 2 * 12 * (128 * 7_077_888 + 2 * 128 * 128 * 768) == 2 * 11_173_625_856
    assert flops.head == 2 * (768 * 768 + 768 * 2)
    assert round(flops.total / 2e9, 2) == 11.17
    parameters = count_parameters(model)
    assert parameters.total == 109_483_778
    assert parameters.linear == 12 * 7_077_888
    assert parameters.encoder == 12 * (7_077_888 + 4 * 768 + 3072 + 768 + 4 * 768)
    assert parameters.layers == (parameters.encoder // 12,) * 12


def test_costs_of_sequences_add_up_and_their_order_does_not_matter(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    single = [count_flops(model, [length]) for length in (3, 9, 5)]
    assert count_flops(model, [5, 3, 9]).total == sum(flops.total for flops in single)


def test_attention_shrinks_with_the_heads_a_layer_has_left(tiny):
    model = tiny("bert", "BertModel")
    attention = model.encoder.layer[0].attention
    before = count_flops(model, [10]).layers[0]
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(32, 8))
    attention.output.dense = nn.Linear(8, 32)
    pruned_linears, pruned_attention = 2 * 10 * 4 * 32 * 24, 4 * 100 * 3 * 8
    assert count_flops(model, [10]).layers[0] == before - pruned_linears - pruned_attention
    assert count_flops(model, [10]).total == sum(counted_by_torch(model, [10]).values())


def test_low_rank_linears_cost_what_their_two_factors_cost(tiny):
    model = tiny("gpt2", "GPT2LMHeadModel")
    for slot in describe(model).linears:
        in_features, out_features = linear_shape(get_module(model, slot.path))
        thin = LowRankLinear(nn.Linear(in_features, 3, bias=False), nn.Linear(3, out_features))
        replace_module(model, slot.path, thin)
    assert count_flops(model, LENGTHS).total == sum(counted_by_torch(model).values())
    parameters = count_parameters(model)
    assert parameters.linear == 2 * 3 * ((32 + 96) + (32 + 32) + (32 + 48) + (48 + 32))
    assert parameters.total == sum(parameter.numel() for parameter in model.parameters())


def test_a_linear_in_training_form_counts_as_it_will_be_deployed(tiny):
    model = tiny("bert", "BertModel")
    before_flops, before = count_flops(model, [4]), count_parameters(model)
    layer = SoftThresholdLinear(model.encoder.layer[1].intermediate.dense)
    layer.pin(torch.arange(32) < 5)
    model.encoder.layer[1].intermediate.dense = layer
    saved = 32 * 48 - 5 * (32 + 48)
    after_flops, after = count_flops(model, [4]), count_parameters(model)
    assert before_flops.layers[1] - after_flops.layers[1] == 2 * 4 * saved
    assert (
        before.linear - after.linear == before.encoder - after.encoder == before.total - after.total == saved
    )


def test_factorised_embeddings_cost_their_projection_on_every_token(tiny):
    model = tiny("bert", "BertModel")
    before = count_flops(model, LENGTHS)
    model.embeddings.word_embeddings = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 32, bias=False))
    after = count_flops(model, LENGTHS)
    assert (before.embeddings, after.embeddings) == (0.0, 2 * 14 * 6 * 32)
    assert after.total == sum(counted_by_torch(model).values())


@PEFT_WARNS
def test_active_lora_adapters_count_and_merged_or_disabled_ones_do_not(tiny):
    peft = pytest.importorskip("peft")
    model = tiny("bert", "BertForSequenceClassification")
    dense_flops, dense = count_flops(model, LENGTHS), count_parameters(model)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    adapted = peft.get_peft_model(model, config).eval()
    adapters = 2 * 2 * 2 * (32 + 32)
    assert count_flops(model, LENGTHS).total == dense_flops.total + 2 * 14 * adapters
    assert count_flops(model, LENGTHS).total == sum(counted_by_torch(model).values())
    assert count_parameters(model).linear == dense.linear + adapters
    assert count_parameters(model).total == dense.total + adapters
    with adapted.disable_adapter():
        assert count_flops(model, LENGTHS) == dense_flops
    adapted.merge_adapter()
    assert count_flops(model, LENGTHS) == dense_flops
    assert count_parameters(model) == dense


def test_parameters_of_a_plain_model_are_all_counted_and_tied_ones_once(tiny):
    for model_type, name in [
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForMaskedLM"),
        ("mamba", "MambaForCausalLM"),
    ]:
        model = tiny(model_type, name)
        table = sum(parameter.numel() for parameter in model.parameters())
        assert count_parameters(model).total == table
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_a_shared_layer_that_tells_its_own_size_is_counted_once(tiny):
    class Packed(nn.Module):
        kept_parameters = 100

        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight, self.bias = weight, nn.Parameter(torch.zeros(5))

    model = tiny("bert", "BertModel")
    before = count_parameters(model).total
    packed = Packed(nn.Parameter(torch.zeros(700)))
    model.first, model.second = packed, packed
    assert count_parameters(model).total == before + 105
    model.third = nn.ParameterList([packed.weight])
    assert count_parameters(model).total == before + 105


def test_a_module_may_tell_the_flops_of_all_that_is_inside_it():
    block = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    assert flops_per_token(block) == 2 * (32 + 32)
    block.flops_per_token = 11
    assert flops_per_token(nn.Sequential(block, nn.Linear(2, 2))) == 11 + 8


@pytest.mark.parametrize("lengths", [[], [4, 0], [-1]])
def test_lengths_that_are_empty_or_below_one_are_refused(tiny, lengths):
    with pytest.raises(ValueError, match="lengths must hold at least one sequence length, each 1 or more"):
        count_flops(tiny("bert", "BertModel"), lengths)
