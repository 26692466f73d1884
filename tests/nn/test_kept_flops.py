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
from tests.toys_exits import add_exits

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
    """Keeps every other row, at the first layers."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = layers

    def protected(self, real_BT: Tensor) -> Tensor:
        return real_BT & (real_BT.cumsum(dim=1) == 1)

    def decide(self, layer: int, hidden_ND: Tensor, segments: Segments) -> Tensor | None:
        if layer >= self.layers:
            return None
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


def with_exits(model: nn.Module, **settings) -> nn.Module:
    packed_encoder(pack(model)).exits = add_exits(model, **settings)
    return model


def test_an_example_that_left_pays_for_the_layers_and_exits_it_ran_and_for_the_head(tiny):
    model = with_exits(tiny("bert", "BertForSequenceClassification", num_hidden_layers=4), threshold=0.5)
    layer, head, asked = 2 * (4 * 32 * 32 + 2 * 32 * 48), 2 * (32 * 32 + 32 * 2), 2 * 32 * 2
    kept_BL = torch.tensor([[5, 5, 0, 0], [5, 3, 3, 3], [5, 0, 0, 0]])
    squares = [25 + 25, 25 + 3 * 9, 25]
    by_hand = [
        10 * layer + 128 * squares[0] + 2 * asked + head,
        14 * layer + 128 * squares[1] + 3 * asked + head,
        5 * layer + 128 * squares[2] + 1 * asked + head,
    ]
    lengths_B = torch.tensor([5, 5, 5])
    assert count_kept_flops(model, kept_BL, lengths_B).tolist() == by_hand
    told = count_kept_flops(model, kept_BL, lengths_B, exit_flops=[1, 10, 100, 1000])
    free = count_kept_flops(model, kept_BL[1:2], lengths_B[1:2], exit_flops=0).item()
    assert free == by_hand[1] - 3 * asked
    assert told.tolist() == [by_hand[0] - 2 * asked + 11, free + 1111, by_hand[2] - asked + 1]


def test_only_exits_that_are_asked_cost_something_and_a_learned_rule_comes_on_top(tiny):
    model = with_exits(tiny("bert", "BertModel", num_hidden_layers=4), rule="learned", threshold=0.5)
    rule = packed_encoder(model).exits.rule
    assert DroppingCosts.of(model).exits == (2 * 32 * 2 + 2 * 32,) * 3 + (0,)
    rule.is_checked_K[1] = False
    assert DroppingCosts.of(model).exits == (192, 0, 192, 0)
    rule.threshold.fill_(rule.off)
    assert DroppingCosts.of(model).exits == (0, 0, 0, 0)


def test_nothing_is_scored_of_examples_that_left_and_their_last_layer_is_free(tiny):
    model = with_exits(tiny("bert", "BertForSequenceClassification", num_hidden_layers=3), threshold=0.5)
    lengths_B = torch.tensor([6, 6])
    gone, there = torch.tensor([[4, 0, 0]]), torch.tensor([[4, 1, 1]])
    for last_layer in ("all", "first"):
        costs = [
            DroppingCosts.of(model, policy_flops_per_token=scored, exit_flops=0, last_layer=last_layer)
            for scored in (0, 1)
        ]
        scores = [
            (costs[1].flops(kept_BL, lengths_B[:1]) - costs[0].flops(kept_BL, lengths_B[:1])).item()
            for kept_BL in (gone, there)
        ]
        assert scores == [6, 6 + 4 + 1]
        saved = (costs[0].flops(there, lengths_B[:1]) - costs[0].flops(gone, lengths_B[:1])).item()
        assert saved == 2 * (2 * (4 * 32 * 32 + 2 * 32 * 48) + 128)


def test_examples_leave_for_good_and_only_where_there_are_exits(tiny):
    model = tiny("bert", "BertModel", num_hidden_layers=3)
    kept_BL, lengths_B = torch.tensor([[3, 0, 0]]), torch.tensor([4])
    with pytest.raises(ValueError, match="keeps 0 of 3 at layer 1"):
        count_kept_flops(model, kept_BL, lengths_B)
    with_exits(model)
    assert count_kept_flops(model, kept_BL, lengths_B).item() > 0
    for wrong, message in (
        ([[0, 0, 0]], "keeps 0 of 4 at layer 0"),
        ([[3, 0, 1]], "keeps 1 of 0 at layer 2"),
    ):
        with pytest.raises(ValueError, match=message):
            count_kept_flops(model, torch.tensor(wrong), lengths_B)


@pytest.mark.parametrize(("model_type", "name"), ENCODERS)
@pytest.mark.parametrize("drops", [False, True])
def test_the_packed_engine_with_exits_runs_as_many_flops_as_are_counted(tiny, model_type, name, drops):
    depth = {"n_layers": 4} if model_type == "distilbert" else {"num_hidden_layers": 4}
    model = with_exits(tiny(model_type, name, **depth), threshold=0.5)
    encoder = packed_encoder(model)
    assert encoder is not None
    encoder.policy = Halving() if drops else None
    encoder.exits.rule.measure = lambda layer, logits_BC, hidden_BD: (
        torch.arange(len(logits_BC)) % 3
    )  # 0 leaves
    lengths = [21, 20, 16, 18, 13, 15, 17, 9]  # the kernel fills up no keys of these
    mask_BT = (torch.arange(21) < torch.tensor(lengths)[:, None]).long()
    ids_BT = torch.randint(2, 50, (8, 21), generator=torch.Generator().manual_seed(3))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: attention_flops})
    with counter, torch.no_grad():
        model(input_ids=ids_BT, attention_mask=mask_BT)
    kept_BL = torch.stack([segments.lengths_B for segments in encoder.latest], dim=1)
    assert (kept_BL > 0).sum(dim=0).tolist() == [8, 5, 3, 2]
    last_layer = "first" if encoder.first_only else "all"
    counted_B = count_kept_flops(model, kept_BL, mask_BT.sum(dim=1), last_layer=last_layer)
    padding = int((1 - mask_BT).sum()) * DroppingCosts.of(model).embedded
    assert counter.get_total_flops() == counted_B.sum().item() + padding
