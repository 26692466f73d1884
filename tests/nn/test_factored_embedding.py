"""Word embeddings of low rank, with and without a head that shares them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_compress.nn.anatomy import describe
from lightning_compress.nn.factored_embedding import (
    FactoredEmbedding,
    TiedHead,
    check_embedding_rank,
    factor_embedding,
    leading_basis,
)
from lightning_compress.nn.flops import count_flops, count_parameters
from lightning_compress.nn.surgery import Ledger, get_module, names_of
from tests.toys import CLASSIFIERS

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 49]])
TIED = [
    ("bert", "BertForMaskedLM", {}),
    ("roberta", "RobertaForMaskedLM", {}),
    ("distilbert", "DistilBertForMaskedLM", {}),
    ("electra", "ElectraForMaskedLM", {}),
    ("gpt2", "GPT2LMHeadModel", {}),
    ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
]


def word_embeddings(model: PreTrainedModel) -> nn.Module:
    return get_module(model, describe(model).word_embeddings)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def truncated(weight_VD: Tensor, rank: int) -> Tensor:
    """Sum of the leading outer products, one after the other, from the full decomposition."""
    u_VM, sigma_M, v_MD = torch.linalg.svd(weight_VD.double(), full_matrices=False)
    total_VD = torch.zeros_like(weight_VD, dtype=torch.float64)
    for m in range(rank):
        total_VD += sigma_M[m] * torch.outer(u_VM[:, m], v_MD[m])
    return total_VD.float()


@pytest.mark.parametrize("rank", [1, 5, 31])
def test_the_factors_are_the_truncated_decomposition(tiny, rank) -> None:
    model = tiny("bert", "BertModel")
    before = word_embeddings(model).weight.detach().clone()
    factored = factor_embedding(model, rank)
    assert factored is word_embeddings(model)
    assert (factored.table.weight.shape, factored.projection.weight.shape) == ((50, rank), (32, rank))
    assert factored.projection.bias is None
    assert torch.allclose(factored.weight, truncated(before, rank), atol=1e-6)
    assert torch.allclose(factored(IDS), truncated(before, rank)[IDS], atol=1e-6)
    gram_RR = factored.projection.weight.T @ factored.projection.weight
    assert torch.allclose(gram_RR, torch.eye(rank), atol=1e-5)


def test_the_squared_error_is_that_of_the_singular_values_left_out(tiny) -> None:
    model = tiny("bert", "BertModel")
    before = word_embeddings(model).weight.detach().clone()
    left_out = torch.linalg.svdvals(before)[20:].square().sum()
    error = (factor_embedding(model, 20).weight - before).square().sum()
    assert torch.allclose(error, left_out, rtol=1e-4)


def test_a_basis_by_hand() -> None:
    weight_VD = torch.tensor([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(leading_basis(weight_VD, 2).abs(), expected)


def test_a_long_table_is_summed_up_in_pieces() -> None:
    weight_VD = torch.randn(9001, 6)
    basis_DR = leading_basis(weight_VD, 2)
    reference_DR = torch.linalg.svd(weight_VD, full_matrices=False).Vh[:2].T
    assert torch.allclose(basis_DR @ basis_DR.T, reference_DR @ reference_DR.T, atol=1e-4)


@pytest.mark.parametrize(("model_type", "name"), CLASSIFIERS)
def test_every_family_runs_on_what_is_left_of_its_embeddings(tiny, model_type, name) -> None:
    model = tiny(model_type, name, num_labels=3)
    embedding = word_embeddings(model)
    with torch.no_grad():
        embedding.weight.copy_(truncated(embedding.weight, 6))
    expected, ledger = logits(model), Ledger(model)
    factor_embedding(model, 6, ledger)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert model.get_input_embeddings() is word_embeddings(model)
    ledger.revert()
    assert type(word_embeddings(model)) is nn.Embedding
    assert word_embeddings(model).weight.shape == embedding.weight.shape


def test_full_rank_leaves_the_embeddings_alone(tiny) -> None:
    model = tiny("bert", "BertModel")
    embedding, ledger = word_embeddings(model), Ledger(model)
    assert factor_embedding(model, 32, ledger) is None
    assert word_embeddings(model) is embedding and len(ledger) == 0


def test_factors_are_multiplied_back_before_the_next_decomposition(tiny) -> None:
    model = tiny("bert", "BertModel")
    before, ledger = word_embeddings(model).weight.detach().clone(), Ledger(model)
    factor_embedding(model, 20, ledger)
    factor_embedding(model, 7, ledger)
    assert torch.allclose(word_embeddings(model).weight, truncated(before, 7), atol=1e-6)
    ledger.revert()
    assert word_embeddings(model).weight.shape == (50, 32)


def test_a_frozen_table_and_its_padding_stay_as_they_are(tiny) -> None:
    model = tiny("bert", "BertModel")
    word_embeddings(model).weight.requires_grad_(False)
    factored = factor_embedding(model, 4)
    assert not any(parameter.requires_grad for parameter in factored.parameters())
    assert factored.padding_idx == factored.table.padding_idx == 1


def test_half_precision_stays(tiny) -> None:
    model = tiny("bert", "BertModel").to(torch.bfloat16)
    before = word_embeddings(model).weight.detach().float()
    factored = factor_embedding(model, 31)
    assert {parameter.dtype for parameter in factored.parameters()} == {torch.bfloat16}
    assert torch.allclose(factored.weight.float(), truncated(before, 31), atol=1e-3)


def test_on_the_meta_device_there_are_shapes_only(tiny) -> None:
    with torch.device("meta"):
        model = tiny("bert", "BertModel")
        factored = factor_embedding(model, 4)
    assert factored.table.weight.is_meta and factored.table.weight.shape == (50, 4)


@pytest.mark.parametrize(("model_type", "name", "changes"), TIED)
def test_a_head_that_shares_the_table_shares_its_factors(tiny, model_type, name, changes) -> None:
    model = tiny(model_type, name, **changes)
    embedding = word_embeddings(model)
    shared = names_of(model, embedding.weight)
    assert len(shared) == 2
    with torch.no_grad():
        embedding.weight.copy_(truncated(embedding.weight, 6))
    expected, before = logits(model), count_parameters(model).total
    ledger = Ledger(model)
    factored = factor_embedding(model, 6, ledger)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    head = model.get_output_embeddings()
    assert isinstance(head, TiedHead) and head.weight.shape == embedding.weight.shape
    entries, width = embedding.weight.shape
    assert before - count_parameters(model).total == entries * width - 6 * (entries + width)
    assert not [name for name in model.state_dict() if factored.table.weight is model.state_dict()[name]]
    model.tie_weights()
    assert torch.allclose(logits(model), expected, atol=1e-5)
    ledger.revert()
    assert names_of(model, word_embeddings(model).weight) == shared
    model.tie_weights()
    assert names_of(model, word_embeddings(model).weight) == shared


def test_a_tied_head_of_a_copy_uses_the_embeddings_of_the_copy(tiny) -> None:
    model = tiny("gpt2", "GPT2LMHeadModel")
    factor_embedding(model, 6)
    twin = copy.deepcopy(model)
    assert twin.lm_head.embedding is twin.transformer.wte
    assert twin.lm_head.embedding is not model.transformer.wte


def test_both_sides_of_tied_factors_get_gradients_and_the_next_rank(tiny) -> None:
    model = tiny("gpt2", "GPT2LMHeadModel")
    factor_embedding(model, 8)
    model(input_ids=IDS, labels=IDS).loss.backward()
    seen = model.transformer.wte.table.weight.grad.abs().sum(dim=1) > 0
    assert bool(seen.all()), "through the head every entry of the vocabulary gets a gradient"
    factored = factor_embedding(model, 3)
    assert model.lm_head.embedding is factored and factored.rank == 3


def test_the_flops_of_a_tied_head_are_those_of_its_two_products(tiny) -> None:
    model = tiny("gpt2", "GPT2LMHeadModel")
    assert count_flops(model, [3]).head == 3 * 2 * 50 * 32
    factor_embedding(model, 6)
    counted = count_flops(model, [3])
    assert (counted.head, counted.embeddings) == (3 * 2 * 6 * (50 + 32), 3 * 2 * 6 * 32)


@pytest.mark.parametrize("rank", [0, 33, 2.0, True])
def test_impossible_ranks_are_refused(tiny, rank) -> None:
    model = tiny("bert", "BertModel")
    with pytest.raises(ValueError, match=r"embedding_rank=.* is outside 1 to 32"):
        factor_embedding(model, rank)


def test_weights_that_are_not_finite_are_refused(tiny) -> None:
    model = tiny("bert", "BertModel")
    with torch.no_grad():
        word_embeddings(model).weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="training has diverged"):
        factor_embedding(model, 4)


def test_sharing_with_another_table_is_refused(tiny) -> None:
    model = tiny("bert", "BertModel")
    model.embeddings.position_embeddings.weight = model.embeddings.word_embeddings.weight
    with pytest.raises(ValueError, match=r"share their weights with embeddings\.position_embeddings"):
        check_embedding_rank(model, 4)


def test_electra_s_narrow_embeddings_are_factored_at_their_own_width(tiny) -> None:
    model = tiny("electra", "ElectraModel")
    factored = factor_embedding(model, 3)
    assert isinstance(factored, FactoredEmbedding) and factored.embedding_dim == 16
    with pytest.raises(ValueError, match="outside 1 to 16"):
        factor_embedding(model, 17)
