"""Tiny random models of every family: two layers, 32 wide, four heads of 8 (two key-value heads in Llama)."""

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

_BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_SIZES = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": {**_BERT, "embedding_size": 16},
    "distilbert": {
        "vocab_size": 50,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 40,
    },
    "gpt2": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 40},
    "llama": {**_BERT, "num_key_value_heads": 2, "head_dim": 8},
    "mamba": {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "time_step_rank": 3,
    },
}
_CONFIGS = {
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "electra": "ElectraConfig",
    "distilbert": "DistilBertConfig",
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "mamba": "MambaConfig",
}


@pytest.fixture
def tiny():
    """Return a builder of tiny models: ``tiny("bert", "BertForSequenceClassification", num_labels=3)``."""

    def build(model_type: str, class_name: str, **changes) -> PreTrainedModel:
        torch.manual_seed(0)
        config: PretrainedConfig = getattr(transformers, _CONFIGS[model_type])(
            **{**_SIZES[model_type], **changes}
        )
        for token in ("bos_token_id", "eos_token_id"):
            setattr(config, token, None)  # the defaults lie outside the tiny vocabulary
        config.pad_token_id = 1
        config._attn_implementation = "eager"
        return getattr(transformers, class_name)(config).eval()

    return build
