"""Shape legend: B sequences, L layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.flops import count_flops
from lightning_compress.nn.kept_flops import DroppingCosts, count_kept_flops
from lightning_compress.nn.segments import Segments
from lightning_compress.nn.surgery import get_module
from lightning_compress.runtime import pack, packed_encoder

ENCODERS = [
    ("bert", "BertForSequenceClassification"),
    ("bert", "BertModel"),
    ("roberta", "RobertaForSequenceClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("electra", "ElectraForSequenceClassification"),
]
PREDICTOR = 2 * (768 * 32 + 32)  # MACs of AdapLeR's two linears, biases left out


class Policy(nn.Module):
    def flops_per_token_of(self, layer: int) -> int:
        return [5, 7][layer]


def bert_base(num_labels: int) -> BertForSequenceClassification:
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(num_labels=num_labels))


def paper_flops(lengths: list[int], num_labels: int) -> int:
    """AdapLeR on BERT-base, the official code's fit of a profiled graph."""
    layers = sum(3156 * n * n + 14_233_554 * n for n in lengths)
    return layers + 6152 * lengths[0] + 1_183_537 + 1537 * (num_labels - 1)


def what_the_paper_adds(lengths: list[int], num_labels: int) -> int:
    """What its profile has beyond our count: softmax, norms, activations, biases, and scores after removal."""
    softmax = sum(84 * n * n for n in lengths)
    small = sum((14_233_554 - 14_155_776) * n for n in lengths) + 6152 * lengths[0]
    once = 1_183_537 + 1537 * (num_labels - 1) - 2 * (768 * 768 + 768 * num_labels)
    return softmax + small + once


def counted_by_torch(model: nn.Module, kept: list[int], hidden_size: int = 32) -> float:
    """FLOPs of the family's own layers, each run over as many tokens as it keeps."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        for layer, tokens in zip(describe(model).layers, kept, strict=True):
            get_module(model, layer.path)(torch.zeros(1, tokens, hidden_size))
    return float(counter.get_total_flops())


@pytest.mark.parametrize(("model_type", "name"), ENCODERS)
def test_without_dropping_the_count_equals_count_flops(tiny, model_type, name):
    model, lengths = tiny(model_type, name), [7, 1, 12]
    kept_BL = torch.tensor(lengths)[:, None].expand(3, 2)
    flops_B = count_kept_flops(model, kept_BL, torch.tensor(lengths))
    assert flops_B.dtype == torch.float64
    assert flops_B.tolist() == [count_flops(model, [length]).total for length in lengths]


@pytest.mark.parametrize(("model_type", "name"), ENCODERS)
def test_layers_that_keep_fewer_tokens_cost_what_torch_counts_for_them(tiny, model_type, name):
    model = tiny(model_type, name)
    dense = count_flops(model, [9])
    flops_B = count_kept_flops(model, torch.tensor([[6, 2]]), torch.tensor([9]))
    assert flops_B.item() == counted_by_torch(model, [6, 2]) + dense.head + dense.embeddings


def test_bert_base_costs_the_papers_count_less_what_only_its_profile_has():
    lengths = [60, 40, 30, 20, 12, 8, 6, 4, 3, 2, 2, 1]
    assert paper_flops(lengths, 2) == 2_698_853_714
    kept_BL, lengths_B = torch.tensor([lengths, [64] * 12]), torch.tensor([64, 64])
    ours, full = count_kept_flops(bert_base(2), kept_BL, lengths_B).tolist()
    assert ours == 2_698_853_714 - what_the_paper_adds(lengths, 2)
    assert full == 11_088_071_986 - what_the_paper_adds([64] * 12, 2)
    priced = count_kept_flops(bert_base(2), kept_BL, lengths_B, policy_flops_per_token=PREDICTOR).tolist()
    before = [64, *lengths[:-1]]
    assert priced[0] == ours + PREDICTOR * sum(before)
    assert priced[0] == pytest.approx(2_698_853_714, rel=2.5e-3)
    assert priced[1] == pytest.approx(11_088_071_986, rel=2.5e-3)


def test_the_dense_check_value_of_the_paper_is_met_up_to_small_terms():
    assert count_flops(bert_base(2), [64]).total == pytest.approx(11_050_164_739, rel=2.5e-3)


def test_the_last_layer_for_the_first_token_only_costs_keys_and_values_of_all_kept(tiny):
    model = tiny("bert", "BertForSequenceClassification")
    kept_BL, lengths_B = torch.tensor([[6, 4]]), torch.tensor([9])
    saved = count_kept_flops(model, kept_BL, lengths_B) - count_kept_flops(
        model, kept_BL, lengths_B, last_layer="first"
    )
    query_output_ffn = 2 * (2 * 32 * 32 + 2 * 32 * 48)
    assert saved.item() == 3 * query_output_ffn + 4 * 32 * (4 * 4 - 4)
    alone = torch.tensor([[6, 1]])
    assert torch.equal(
        count_kept_flops(model, alone, lengths_B),
        count_kept_flops(model, alone, lengths_B, last_layer="first"),
    )


@pytest.mark.parametrize(("flops", "per_layer"), [(11, [11, 11]), ([5, 7], [5, 7]), (None, [5, 7])])
def test_scores_are_priced_at_the_tokens_before_removal(tiny, flops, per_layer):
    model = tiny("bert", "BertForSequenceClassification")
    kept_BL, lengths_B = torch.tensor([[6, 2]]), torch.tensor([9])
    bare = count_kept_flops(model, kept_BL, lengths_B).item()
    model.bert.encoder.policy = Policy()
    priced = count_kept_flops(model, kept_BL, lengths_B, policy_flops_per_token=flops).item()
    assert priced - bare == 9 * per_layer[0] + 6 * per_layer[1]


def test_expected_counts_are_differentiable(tiny):
    model = tiny("bert", "BertModel")
    kept_BL = torch.tensor([[6.5, 2.25]], dtype=torch.float64, requires_grad=True)
    lengths_B = torch.tensor([9])
    (gradient_BL,) = torch.autograd.grad(
        count_kept_flops(model, kept_BL, lengths_B, policy_flops_per_token=10).sum(), kept_BL
    )
    linear, pair = 2 * (4 * 32 * 32 + 2 * 32 * 48), 4 * 32
    assert gradient_BL.tolist() == [[linear + 2 * 6.5 * pair + 10, linear + 2 * 2.25 * pair]]
    costs = DroppingCosts.of(model, policy_flops_per_token=10)
    assert torch.autograd.gradcheck(lambda kept: costs.flops(kept, lengths_B), (kept_BL,))


def slow_count(costs: DroppingCosts, kept: list[int], length: int) -> int:
    """Token by token and pair by pair."""
    total, there = costs.once, length
    for layer, tokens in enumerate(kept):
        total += sum(costs.scored[layer] for _ in range(there))
        total += sum(costs.kept[layer] for _ in range(tokens))
        total += sum(costs.pair[layer] for _ in range(tokens) for _ in range(tokens))
        there = tokens
    return total


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4)
)
def test_examples_cost_the_same_alone_and_together_and_what_a_slow_count_says(triples):
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    with torch.device("meta"):
        costs = DroppingCosts.of(BertModel(config), policy_flops_per_token=[3, 4])
    ordered = [sorted(triple, reverse=True) for triple in triples]
    kept_BL, lengths_B = torch.tensor([kept for _, *kept in ordered]), torch.tensor([n for n, *_ in ordered])
    flops_B = costs.flops(kept_BL, lengths_B)
    assert flops_B.tolist() == [slow_count(costs, kept, length) for length, *kept in ordered]
    alone: list[Tensor] = [costs.flops(kept_BL[b : b + 1], lengths_B[b : b + 1]) for b in range(len(ordered))]
    assert torch.equal(torch.cat(alone), flops_B)


@pytest.mark.parametrize(
    ("kept", "lengths", "message"),
    [
        ([[4, 3, 2]], [5], r"kept_BL must be \[1, 2\]"),
        ([[4, 3]], [5, 6], r"kept_BL must be \[2, 2\]"),
        ([4, 3], [5], r"got \[2\] and \[1\]"),
        ([[4, 3]], [[5]], r"got \[1, 2\] and \[1, 1\]"),
        ([[4, 3], [6, 3]], [5, 5], "sequence 1 keeps 6 of 5 at layer 0"),
        ([[4, 5]], [5], "sequence 0 keeps 5 of 4 at layer 1"),
        ([[1, 0]], [5], "sequence 0 keeps 0 of 1 at layer 1"),
        ([[float("nan"), 1.0]], [5], "keeps nan of 5 at layer 0"),
    ],
)
def test_impossible_counts_are_refused(tiny, kept, lengths, message):
    with pytest.raises(ValueError, match=message):
        count_kept_flops(tiny("bert", "BertModel"), torch.tensor(kept), torch.tensor(lengths))


def test_costs_for_another_number_of_layers_and_unknown_last_layers_are_refused(tiny):
    model = tiny("bert", "BertModel")
    with pytest.raises(ValueError, match="one for each of 2 layers, got 3"):
        DroppingCosts.of(model, policy_flops_per_token=[1, 2, 3])
    with pytest.raises(ValueError, match='last_layer must be "all" or "first", got \'cls\''):
        DroppingCosts.of(model, last_layer="cls")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("bert", "BertForTokenClassification"), ("gpt2", "GPT2ForSequenceClassification")],
)
def test_models_that_need_every_token_are_refused(tiny, model_type, name):
    with pytest.raises(ValueError, match="needs every token at its output"):
        DroppingCosts.of(tiny(model_type, name))


def attention_flops(query_BHQE, key_BHKE, value_BHKE, *args, out_shape=None, **kwargs) -> int:
    """The kernel of the CPU, which torch leaves out of its count; shapes, not tensors."""
    batch, heads, queries, width = query_BHQE
    return 4 * batch * heads * queries * key_BHKE[2] * width


class Halving(nn.Module):
    """Keeps every other row, at every layer."""

    def protected(self, real_BT: Tensor) -> Tensor:
        return real_BT & (real_BT.cumsum(dim=1) == 1)

    def decide(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor:
        places_N = torch.arange(segments.num_rows) - segments.firsts_B[segments.sequence_N]
        return places_N % 2 == 0


@pytest.mark.parametrize(("model_type", "name"), ENCODERS)
def test_the_packed_engine_runs_as_many_flops_as_are_counted(tiny, model_type, name):
    model = pack(tiny(model_type, name))
    encoder = packed_encoder(model)
    assert encoder is not None
    encoder.policy = Halving()
    mask_BT = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: attention_flops})
    with counter, torch.no_grad():
        model(input_ids=torch.full((2, 12), 5), attention_mask=mask_BT)
    kept_BL = torch.stack([segments.lengths_B for segments in encoder.latest], dim=1)
    assert kept_BL.tolist() == [[6, 3], [5, 3]]
    last_layer = "first" if encoder.first_only else "all"
    counted_B = count_kept_flops(model, kept_BL, mask_BT.sum(dim=1), last_layer=last_layer)
    # embeddings are computed before the padding leaves
    padding = 3 * DroppingCosts.of(model).embedded
    assert counter.get_total_flops() == counted_B.sum().item() + padding
