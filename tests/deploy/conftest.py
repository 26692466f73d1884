"""Tiny random models of every family, compressed without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lightning_compress.compressor import Compressor
from lightning_compress.deploy import attach_plan
from lightning_compress.methods.soft_threshold_rank import SoftThresholdRankConfig

_ENCODER: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "num_labels": 3,
}


def _bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**_ENCODER))


def _roberta() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**_ENCODER, pad_token_id=1))


def _distilbert() -> PreTrainedModel:
    config = DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=3)
    return DistilBertForSequenceClassification(config)


def _electra() -> PreTrainedModel:
    return ElectraForSequenceClassification(ElectraConfig(**_ENCODER, embedding_size=16))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=24, eos_token_id=0, bos_token_id=0
    )
    return GPT2LMHeadModel(config)


def _llama() -> PreTrainedModel:
    sizes = {name: value for name, value in _ENCODER.items() if name != "num_labels"}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, eos_token_id=0, bos_token_id=0))


def _mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=0)
    return MambaForCausalLM(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "electra": _electra,
    "gpt2": _gpt2,
    "llama": _llama,
    "mamba": _mamba,
}


def _compress(model: PreTrainedModel) -> PreTrainedModel:
    """Halve the linears of a model and let it carry its plan."""
    compressor = Compressor(model, [SoftThresholdRankConfig(target_params=0.5, rank_multiple=1, init="svd")])
    compressor.prepare()
    attach_plan(model, compressor.convert())
    return model.eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def build() -> dict[str, Callable[[], PreTrainedModel]]:
    """Builders of dense models by family."""
    return BUILDERS


@pytest.fixture
def compress() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Compress a model in place, and return it."""
    return _compress


@pytest.fixture(params=sorted(BUILDERS))
def compressed(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A compressed model of each family in turn."""
    return _compress(BUILDERS[request.param]())


@pytest.fixture
def bert() -> PreTrainedModel:
    """A compressed BERT classifier."""
    return _compress(_bert())


@pytest.fixture
def logits() -> Callable[[PreTrainedModel], Tensor]:
    """Run a model on two texts of tokens, the second one padded where the model knows padding."""

    def run(model: PreTrainedModel) -> Tensor:
        tokens = torch.arange(2, 18).view(2, 8).to(model.device)
        with torch.no_grad():
            return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits

    return run
