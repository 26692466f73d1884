"""Tiny pretrained folders, as a user would have them: random weights and a word-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "good",
    "bad",
    "fine",
    "poor",
    "film",
    "plot",
    "a",
    "b",
    "c",
    "d",
)


def word_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """One token per word of ``VOCABULARY``; classification marks around the text if it is an encoder's."""
    tokenizer = Tokenizer(
        WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if "cls_token" in settings:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **settings)


def save_tiny_encoder(folder: Path, **overrides: Any) -> str:
    """Save a two-layer BERT with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=32, **{**sizes, **overrides})
    BertModel(config).save_pretrained(folder)
    word_tokenizer(
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return str(folder)


def save_tiny_decoder(folder: Path, with_weights: bool = True) -> str:
    """Save a two-layer Llama with its tokenizer, or its configuration only."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
    )
    if with_weights:
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    word_tokenizer(bos_token="[CLS]", eos_token="[SEP]").save_pretrained(folder)
    return str(folder)
