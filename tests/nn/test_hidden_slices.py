"""The hidden width: sliced equals a model whose norms look at the kept channels alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.contribution_token_dropping import ContributionPredictor
from lightning_compress.nn.exit_rules import LearnedRule
from lightning_compress.nn.factored_embedding import factor_embedding
from lightning_compress.nn.hidden_slices import check_hidden, slice_hidden
from lightning_compress.nn.multi_exit import ExitHead, install_exits
from lightning_compress.nn.surgery import Ledger, get_module, names_of
from lightning_compress.nn.width_surgery import Widths, apply_widths

KEEP = [0, 1, 4, 9, 10, 17, 23, 24, 30, 31]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
MODELS = [
    ("bert", "BertModel", {}),
    ("bert", "BertForSequenceClassification", {}),
    ("bert", "BertForTokenClassification", {}),
    ("bert", "BertForPreTraining", {"tie_word_embeddings": False}),
    ("roberta", "RobertaForSequenceClassification", {}),
    ("roberta", "RobertaForMaskedLM", {"tie_word_embeddings": False}),
    ("distilbert", "DistilBertForSequenceClassification", {}),
    ("distilbert", "DistilBertForTokenClassification", {}),
    ("distilbert", "DistilBertForMaskedLM", {"tie_word_embeddings": False}),
    ("electra", "ElectraForSequenceClassification", {}),
    ("electra", "ElectraForTokenClassification", {"embedding_size": 32}),
    ("electra", "ElectraForPreTraining", {}),
    ("electra", "ElectraForMaskedLM", {}),
    ("gpt2", "GPT2ForSequenceClassification", {}),
    ("gpt2", "GPT2LMHeadModel", {}),
    ("llama", "LlamaForSequenceClassification", {}),
    ("llama", "LlamaForCausalLM", {}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
]


class NormOfSome:
    """Makes a norm see the kept channels alone and put zeros into the others, one row at a time."""

    def __init__(self, keep: list[int]) -> None:
        self.keep = keep

    def __call__(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        result = torch.zeros_like(output)
        for row, x_D in zip(
            result.view(-1, result.shape[-1]), args[0].view(-1, result.shape[-1]), strict=True
        ):
            kept = x_D[self.keep]
            if isinstance(norm, nn.LayerNorm):
                kept = (kept - kept.mean()) / (kept.var(unbiased=False) + norm.eps).sqrt()
                row[self.keep] = kept * norm.weight[self.keep] + norm.bias[self.keep]
            else:
                kept = kept / (kept.square().mean() + norm.variance_epsilon).sqrt()
                row[self.keep] = kept * norm.weight[self.keep]
        return result


def lively(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=MASK)
    return found.last_hidden_state if hasattr(found, "last_hidden_state") else found[0]


def zero_outside(model: nn.Module, keep: list[int]) -> list:
    """Close the other channels everywhere norms put something into the stream, and in what is written to it."""
    anatomy = describe(model)
    norms = {path for layer in anatomy.layers for path in layer.norms}
    norms |= {path for path in anatomy.residual_writers if get_module(model, path).weight.dim() == 1}
    handles = [get_module(model, path).register_forward_hook(NormOfSome(keep)) for path in sorted(norms)]
    dropped = [d for d in range(32) if d not in keep]
    for path in anatomy.residual_writers:
        module = get_module(model, path)
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight[dropped], module.bias[dropped] = 0.0, 0.0
    return handles


@pytest.mark.parametrize(("model_type", "name", "changes"), MODELS)
def test_a_narrow_stream_computes_what_the_other_channels_at_zero_would(
    tiny, model_type, name, changes
) -> None:
    model = lively(tiny(model_type, name, **changes))
    handles = zero_outside(model, KEEP)
    expected = outputs(model)
    for handle in handles:
        handle.remove()
    slice_hidden(model, KEEP)
    expected = expected[..., KEEP] if name == "BertModel" else expected
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    assert describe(model).hidden_size == len(KEEP)


@pytest.mark.parametrize(("model_type", "name", "changes"), MODELS)
def test_all_channels_are_the_identity_to_the_last_bit(tiny, model_type, name, changes) -> None:
    model = lively(tiny(model_type, name, **changes))
    expected = outputs(model)
    slice_hidden(model, range(32))
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize(("model_type", "name", "changes"), MODELS)
def test_reverting_gives_shapes_and_ties_back(tiny, model_type, name, changes) -> None:
    model = tiny(model_type, name, **changes)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    before, ledger = describe(model), Ledger(model)
    names = names_of(model, get_module(model, before.word_embeddings).weight)
    slice_hidden(model, KEEP, ledger)
    assert names_of(model, get_module(model, before.word_embeddings).weight) == names
    ledger.revert()
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    assert describe(model) == before
    assert names_of(model, get_module(model, before.word_embeddings).weight) == names


def test_nothing_as_wide_as_before_is_left_but_what_poolers_put_out(tiny) -> None:
    model = tiny("bert", "BertForSequenceClassification")
    slice_hidden(model, KEEP)
    wide = {name for name, parameter in model.named_parameters() if 32 in parameter.shape}
    heads = {name for name in wide if any(role in name for role in ("query", "key", "value", "output.dense"))}
    assert wide - heads == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"}


def test_optimizers_follow_what_is_sliced_twice(tiny) -> None:
    model = tiny("gpt2", "GPT2LMHeadModel")
    before, ledger = dict(model.named_parameters()), Ledger(model)
    widths = Widths(((0, 2), None), ((1, 2), None), embedding_rank=4, hidden=tuple(KEEP))
    apply_widths(model, widths, ledger)
    found = ledger.successors()
    heirs = {id(heir) for heirs in found.values() for heir in heirs}
    now = {id(parameter) for parameter in model.parameters()}
    kept = {id(parameter) for parameter in before.values()} & now
    assert heirs | kept == now and not heirs & kept


@pytest.mark.parametrize("rank", [5, 20])
def test_embeddings_are_factored_at_what_is_left_of_their_width(tiny, rank) -> None:
    model, twin = (lively(tiny("bert", "BertForSequenceClassification")) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    apply_widths(model, Widths((None,) * 2, (None,) * 2, rank, tuple(KEEP)), Ledger(model))
    slice_hidden(twin, KEEP)
    factor_embedding(twin, min(rank, len(KEEP)))
    assert torch.equal(outputs(model), outputs(twin))
    assert model.state_dict().keys() == twin.state_dict().keys()


def test_factored_embeddings_and_tied_heads_are_sliced_too(tiny) -> None:
    model = lively(tiny("gpt2", "GPT2LMHeadModel"))
    factor_embedding(model, 6)
    handles = zero_outside(model, KEEP)
    expected = outputs(model)
    for handle in handles:
        handle.remove()
    slice_hidden(model, KEEP)
    assert torch.allclose(outputs(model), expected, atol=1e-5)


def test_exits_predictors_and_learned_rules_read_the_kept_channels(tiny) -> None:
    model = tiny("bert", "BertForSequenceClassification")
    install_exits(model, [0], pooling="cls", pooler=False, dropout=0.0)
    model.add_module("predictor", ContributionPredictor(32, 4))
    model.add_module("rule", LearnedRule([0], 32))
    state_BD, ledger = torch.zeros(3, 32), Ledger(model)
    state_BD[:, KEEP] = torch.randn(3, len(KEEP))
    parts = [model.exits["0"], model.predictor, model.rule.guess]
    with torch.no_grad():
        expected = [part(state_BD) for part in parts]
        old = parts[0].classifier.weight
        slice_hidden(model, KEEP, ledger)
        for part, wanted in zip(parts, expected, strict=True):
            assert torch.allclose(part(state_BD[:, KEEP]), wanted, atol=1e-6)
    assert ledger.successors()[id(old)] == [parts[0].classifier.weight, parts[0].classifier.bias]
    del model._modules["exits"], model._modules["predictor"], model._modules["rule"]
    ledger.revert()
    assert describe(model).hidden_size == 32


def test_poolers_of_exits_are_refused(tiny) -> None:
    model = tiny("bert", "BertForSequenceClassification")
    install_exits(model, [0], pooling="cls", pooler=True, dropout=0.0)
    with pytest.raises(ValueError, match="poolers of exits"):
        check_hidden(model)
    assert isinstance(model.exits["0"], ExitHead)


@pytest.mark.parametrize("keep", [[], [3, 2], [1, 1], [-1, 2], [32], list(range(9, 33))])
def test_channels_out_of_order_or_range_are_refused(tiny, keep) -> None:
    with pytest.raises(ValueError, match=r"hidden channels must be ascending, at least one, from 0 to 31"):
        slice_hidden(tiny("bert", "BertModel"), keep)


@pytest.mark.parametrize(
    ("model_type", "name", "message"),
    [
        ("bert", "BertForMaskedLM", r"share their weights with \['cls.predictions.decoder.weight'\]"),
        ("distilbert", "DistilBertForMaskedLM", r"share their weights with \['vocab_projector.weight'\]"),
        ("mamba", "MambaModel", "of the family 'mamba' it is not known"),
    ],
)
def test_models_that_cannot_narrow_say_why(tiny, model_type, name, message) -> None:
    model = tiny(model_type, name)
    with pytest.raises(ValueError, match=message):
        check_hidden(model)
